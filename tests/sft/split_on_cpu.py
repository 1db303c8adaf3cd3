"""Trains and resumes a recipe whose model is really split, over processes on a CPU: RECIPE OUT, under torchrun.

accelerate splits a model over GPUs alone, and would quietly leave a whole copy in every gloo process. Here it is told
that gloo processes will do; all that follows is what runs on GPUs, from the configuration to the sharded optimiser, the
gathering of weights, checkpoints and resuming. What this cannot show: NCCL, memory, speed, a GPU's arithmetic.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate import state
from accelerate.utils import DistributedType
from transformers import training_args

from resta.sft import recipe as recipes
from resta.sft import train
from resta.sft.finetune import carry_out as run
from resta.sft.recipe import Recipe


def split_by_fsdp() -> None:
    begin = state.AcceleratorState.__init__

    def begin_split(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_split
    train.check_launch = lambda _: None


def split_by_deepspeed() -> None:
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)
    training_args.is_torch_bf16_gpu_available = lambda: True
    train.on_cpu = lambda _: False


def main(path: Path, out: Path) -> None:
    recipe = recipes.load(Recipe, path)
    {"fsdp": split_by_fsdp, "deepspeed": split_by_deepspeed}[recipe.parallel.strategy]()
    job = train.Job(recipe=recipe, root=path.parent, out=out, device="auto")
    run(job, keep_checkpoints=True)
    if train.is_main():  # back to its second step, as a kill after it leaves it
        shutil.move(out, out.with_name("whole"))
        shutil.rmtree(job.partial / "checkpoint-4")
    torch.distributed.barrier()
    run(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
