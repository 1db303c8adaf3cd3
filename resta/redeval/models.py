"""A language model in this process, asked in batches: sorted by length, left-padded, sized to the memory.

Loads a directory or Hub id, a PEFT adapter on its base, or an unwritten merge (a recipe) straight into memory. Each
prompt is rendered and tokenised once and holds exactly one BOS where the tokenizer adds any. Knows nothing of
questions, judges or engines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resta.chat_templates import NAMED, named_template, read_chat_template
from resta.errors import RequestError, UnansweredError
from resta.fingerprint import folder_fingerprint, sha256_file, sha256_text
from resta.hub import check_there, refuse_pytorch
from resta.out_of_memory import is_out_of_memory
from resta.quantized import nf4
from resta.redeval.messages import Decoding, Message, Rendering
from resta.redeval.thoughts import HARMONY_TOKENS, MARK_TOKENS

if TYPE_CHECKING:
    import torch

# Prompts at once. A greedy answer may differ with the size of its batch, by rounding: of 60 answers of a 135M model in
# bfloat16, on a CPU, 13 do between 64 and 32 rows, none in float32. So it is one number for all devices, and a part of
# a run's configuration.
ROWS = 64
MEMORY_SHARE = 0.8  # of what is free; the rest is for activations
SPREAD = "all"  # the device that means every GPU, layers in turn


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSpec:
    """Where a local model comes from. `model` is a directory, a Hub id (NAME or NAME@REVISION), an adapter's directory,
    or a recipe (.yaml) with `files` naming a directory of config and tokenizer.
    """

    model: str
    base: str | None = None  # for an adapter: the model it sits on, if not the one its config names
    files: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    four_bit: bool = False  # whether its weights are put into 4 bits; dtype is what is computed in
    chat_template: str | None = None  # name of a known one, or path of a Jinja file
    batch_rows: int | None = None

    @property
    def is_recipe(self) -> bool:
        """Whether the model is an unwritten merge."""
        return self.model.endswith((".yaml", ".yml"))

    @property
    def is_adapter(self) -> bool:
        """Whether the model is a PEFT adapter."""
        return (Path(self.model) / "adapter_config.json").is_file()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered and tokenised prompt; `key` names the ask in random draws."""

    key: str
    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens as text. `finish` is "stop" or "length"; counts are tokens without padding; `rows` is the most prompts
    that a batch could hold; `ids` are the new tokens, the one that stopped it last.
    """

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    rows: int
    ids: tuple[int, ...] = ()


class LocalModel:
    """A loaded model and its tokenizer. Answers come in the order of the prompts."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, batch_rows: int | None = None):
        transformers: Any = import_transformers()
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.device = next(model.parameters()).device  # where inputs go and outputs come back
        self.devices = {parameter.device for parameter in model.parameters()}
        self.batch_rows = batch_rows or ROWS
        self.rows_in_force = self.batch_rows  # of the last batch: fewer where memory was short
        self.own_config = model.generation_config
        self.stop_ids = _stop_ids(model.generation_config, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)
        # generate() fills every gap of the config it is given from the model's own, where sampling and
        # penalties hide; greedy must mean the most likely token.
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=self.stop_ids or None, pad_token_id=self.pad_id, bos_token_id=tokenizer.bos_token_id
        )
        self.tokenised = 0  # prompts tokenised so far
        self.adds_bos = adds_bos(tokenizer)
        self.hidden_ids = hidden_ids(tokenizer)

    @property
    def context(self) -> int:
        """Return the longest sequence the model takes, in tokens."""
        return context_of(self.model.config)

    def chat_prompt(self, key: str, messages: Sequence[Message], rendering: Rendering) -> Prompt:
        """Render messages with the model's own chat template and tokenise the result. Raises RequestError."""
        return self.raw_prompt(key, render_chat(self.tokenizer, self.name, messages, rendering))

    def check_template(self, rendering: Rendering) -> None:
        """Try the chat template on one question. Raises RequestError: there is none, or it hides the question."""
        question = "Which number comes after 41?"
        if question not in self.chat_prompt("check", [Message(role="user", content=question)], rendering).text:
            raise RequestError(
                f"{self.name}: its chat template leaves the question out, so that every question would be the same; "
                "name another with --chat-template"
            )

    def raw_prompt(self, key: str, text: str) -> Prompt:
        """Tokenise a whole prompt; exactly one BOS at its start if the tokenizer adds any to plain text."""
        self.tokenised += 1
        return Prompt(key, text, token_ids(self.tokenizer, text, adds_bos=self.adds_bos))

    def without_special(self, text: str) -> str:
        """Return text in which no special token of this tokenizer is spelled out, so that it cannot fake a turn."""
        for token in sorted(self.special_texts, key=len, reverse=True):
            text = text.replace(token, token[:1] + " " + token[1:])
        return text

    @property
    def special_texts(self) -> set[str]:
        """Return the spellings of all special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return {t for t in [*self.tokenizer.all_special_tokens, *(str(a) for a in added if a.special)] if len(t) > 1}

    def clip(self, text: str, tokens: int) -> str:
        """Return the first `tokens` tokens of text, as text."""
        return clip_text(self.tokenizer, text, tokens)

    def check_length(self, prompt: Prompt, decoding: Decoding) -> None:
        """Raise RequestError where a prompt and its answer do not fit the model's context."""
        if len(prompt.ids) + decoding.max_new_tokens > self.context:
            raise RequestError(
                f"{self.name}: a prompt of {len(prompt.ids)} and {decoding.max_new_tokens} new tokens exceed "
                f"its context of {self.context}; lower --max-new-tokens ({prompt.key})"
            )

    def rows_that_fit(self, longest: int, new_tokens: int) -> int:
        """Return how many prompts of `longest` tokens to run at once, by the memory that is free now."""
        row_bytes = kv_bytes_per_token(self.model) * (longest + new_tokens)
        found = [free_bytes(device) for device in self.devices]
        free = min((size for size in found if size is not None), default=None)
        if free is None:
            return self.batch_rows
        return max(1, min(self.batch_rows, int(MEMORY_SHARE * free) // max(1, row_bytes)))

    def take(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[int]:
        """Return the indices of the next batch: the longest prompts first, so that memory runs out early or never."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        self.rows_in_force = self.rows_that_fit(len(prompts[order[0]].ids), decoding.max_new_tokens)
        return order[: self.rows_in_force]

    def answer(
        self, prompts: Sequence[Prompt], decoding: Decoding, *, whole_sequence: bool = False
    ) -> list[Generation]:
        """Generate for one batch; on out-of-memory the batch size is halved for good. Raises UnansweredError."""
        return self._halving(prompts, lambda rows: generate(self, rows, decoding, whole_sequence=whole_sequence))

    def next_token_logprobs(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Return log-probabilities of the token after each prompt: (prompts, vocabulary), float32, on the CPU."""
        import torch

        rows: list[Any] = [None] * len(prompts)
        todo = list(range(len(prompts)))
        one = Decoding(max_new_tokens=1)
        while todo:
            picked = self.take([prompts[i] for i in todo], one)
            batch = [todo[i] for i in picked]
            found = self._halving([prompts[i] for i in batch], lambda part: list(_first_logprobs(self, part)))
            for i, row in zip(batch, found, strict=True):
                rows[i] = row
            todo = [i for i in todo if rows[i] is None]
        return torch.stack(rows)

    def _halving(self, prompts: Sequence[Prompt], work: Any) -> list[Any]:
        """Run `work` on slices of at most `batch_rows` prompts; halve those on out-of-memory."""
        done: list[Any] = []
        while len(done) < len(prompts):
            part = prompts[len(done) : len(done) + self.batch_rows]
            try:
                done += work(part)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UnansweredError(
                        f"{self.name}: out of memory on {self.device} with one prompt of {len(part[0].ids)} "
                        "tokens; lower --max-new-tokens or use a larger device"
                    ) from error
                self.batch_rows = self.rows_in_force = len(part) // 2
            for device in self.devices:
                _empty_cache(device)  # only now: the error's traceback held the failed batch's tensors
        return done


def render_chat(tokenizer: Any, name: str, messages: Sequence[Message], rendering: Rendering) -> str:
    """Return messages as a model's own chat template writes them. Raises RequestError."""
    if not tokenizer.chat_template:
        raise RequestError(
            f"{name}: the tokenizer has no chat template, so how to ask is unknown; name one "
            f"with --chat-template NAME or FILE, as it was trained with: {', '.join(NAMED)} (a base model has none)"
        )
    turns: list[dict[str, Any]] = [
        {
            "role": m.role,
            "content": [{"type": "text", "text": m.content}] if rendering.parts else m.content,
        }
        for m in messages
    ]
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=rendering.generation_prompt,
            **rendering.template_args,
        )
    except Exception as error:  # whatever a Jinja template may raise
        raise RequestError(f"{name}: the chat template refuses these messages: {error}") from error
    return str(text + rendering.suffix)


def token_ids(tokenizer: Any, text: str, *, adds_bos: bool) -> list[int]:
    """Return a whole prompt's tokens; exactly one BOS at its start for a tokenizer that adds any to plain text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not adds_bos:
        return ids
    bos = tokenizer.bos_token_id
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[start:]]


def check_contexts(
    spec: LocalSpec,
    requests: Iterable[tuple[str, Sequence[Message]]],
    rendering: Rendering,
    decoding: Decoding,
    *,
    some: bool = False,
) -> None:
    """Refuse asks, (id, messages) each, whose prompt and answer do not fit the model's context; no weights are loaded.

    With `some` it is enough that one of them fits: the others will be unanswered.

    Raises RequestError, also where the config or the tokenizer cannot be read or the chat template refuses.
    """
    files, revision = split_revision(files_of(spec))
    tokenizer = read_tokenizer(spec)
    try:
        config = import_transformers().AutoConfig.from_pretrained(files, revision=revision, trust_remote_code=False)
        if spec.chat_template is not None:
            tokenizer.chat_template = read_chat_template(spec.chat_template, tokenizer.get_vocab())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(f"{spec.model}: its config cannot be read: {why_not(error)}") from error
    context = context_of(config)
    room = context - decoding.max_new_tokens
    bos = adds_bos(tokenizer)
    lengths: dict[str, int] = {}
    for key, messages in requests:
        text = render_chat(tokenizer, spec.model, messages, rendering)
        # No token is shorter than a byte: most prompts need not be tokenised to be seen to fit.
        short = len(text.encode("utf-8", "replace")) + 2 <= room
        lengths[key] = 0 if short else len(token_ids(tokenizer, text, adds_bos=bos))
    beyond = [key for key, length in lengths.items() if length > room]
    if beyond and not (some and len(beyond) < len(lengths)):
        longest = max(beyond, key=lengths.__getitem__)
        fitting = context - lengths[longest]
        advice = f"--max-new-tokens {fitting} fits all" if fitting > 0 else "the longest fits with no answer at all"
        raise RequestError(
            f"{spec.model}: {len(beyond)} of {len(lengths)} prompts and {decoding.max_new_tokens} new tokens each "
            f"exceed its context of {context}; the longest has {lengths[longest]} tokens ({longest}). {advice}; "
            "or leave out the template, or the questions that are too long"
        )


def context_of(config: Any) -> int:
    """Return the longest sequence that a model of this config takes, in tokens."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def generate(
    local: LocalModel, prompts: Sequence[Prompt], decoding: Decoding, *, whole_sequence: bool = False
) -> list[Generation]:
    """Generate for one batch in one padded call, without any retry; answers in the order of the prompts."""
    import torch
    from transformers import LogitsProcessorList

    ids, mask = _padded(local, prompts)
    processors = LogitsProcessorList(_sampling(local, prompts, decoding, ids.shape[1]))
    with torch.inference_mode():
        out = local.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=processors,
        )
    rows = out[:, ids.shape[1] :].tolist()
    return [_generation(local, prompt, row, whole_sequence) for prompt, row in zip(prompts, rows, strict=True)]


def _generation(local: LocalModel, prompt: Prompt, new: list[int], whole_sequence: bool) -> Generation:
    stop = next((i for i, token in enumerate(new) if token in local.stop_ids), None)
    if whole_sequence:
        kept = new if stop is None else new[: stop + 1]
        text = cut_prompt(local.tokenizer.decode([*prompt.ids, *kept]), prompt.text)
    else:
        kept = [token for token in new[:stop] if token not in local.hidden_ids]
        text = local.tokenizer.decode(kept, skip_special_tokens=False)
    used = len(new) if stop is None else stop + 1
    finish = "length" if stop is None else "stop"
    rows = min(local.rows_in_force, local.batch_rows)
    return Generation(text, finish, len(prompt.ids), used, rows, tuple(new[:used]))


def clip_text(tokenizer: Any, text: str, tokens: int) -> str:
    """Return the first `tokens` tokens of text, as text; a text that is short enough comes back as it is."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens], skip_special_tokens=False))


def token_id(tokenizer: Any, text: str) -> int | None:
    """Return the id of text that is a single token, else None."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None


def cut_prompt(sequence: str, prompt: str) -> str:
    """Return a decoded sequence with the prompt's text replaced by nothing, as red-instruct does it.

    Where decoding does not give the prompt back letter for letter, the prompt stays: that is the published bug.
    """
    sequence, prompt = (text.replace("<s> [INST]", "<s>[INST]") for text in (sequence, prompt))
    return sequence.replace(prompt, "").strip()


def _padded(local: LocalModel, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, left-padded: each (prompts, longest), int64."""
    import torch

    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), local.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    return ids.to(local.device), mask.to(local.device)


def _first_logprobs(local: LocalModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Return (prompts, vocabulary) log-probabilities of one next token, float32, on the CPU."""
    import torch

    ids, mask = _padded(local, prompts)
    with torch.inference_mode():
        # One step of generate() rather than a bare forward: it gets position ids right for padded rows.
        out = local.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.log_softmax(out.logits[0].float(), dim=-1).cpu()


def _sampling(local: LocalModel, prompts: Sequence[Prompt], decoding: Decoding, start: int) -> list[Any]:
    """Return the logits processors that turn greedy choice into keyed sampling; none for greedy decoding."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    own = local.own_config
    if decoding.mode == "greedy" or (decoding.mode == "model" and not own.do_sample):
        return []
    temperature, top_p, top_k, penalty = decoding.temperature, decoding.top_p, 0, 1.0
    if decoding.mode == "model":  # an absent value means the library's default, and top_k's is 50
        temperature, top_p = own.temperature or 1.0, own.top_p or 1.0
        top_k, penalty = (50 if own.top_k is None else own.top_k), own.repetition_penalty or 1.0
    processors: list[Any] = []
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    seeds = [int(sha256_text(f"{decoding.seed}|{prompt.key}")[:15], 16) for prompt in prompts]
    return [*processors, _gumbel(seeds, start)]


def _gumbel(seeds: Sequence[int], start: int) -> Any:
    """Return a processor that adds Gumbel noise keyed by (row's seed, position): argmax is then an exact draw.

    A draw never depends on what else is in the batch, so a resumed run samples what the first would have.
    """
    import numpy as np
    import torch
    from transformers import LogitsProcessor

    class Gumbel(LogitsProcessor):  # type: ignore[misc, unused-ignore]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            step = input_ids.shape[1] - start
            noise = np.stack(
                [np.random.Generator(np.random.Philox(key=[seed, step])).gumbel(size=scores.shape[1]) for seed in seeds]
            )
            return scores.float() + torch.as_tensor(noise, dtype=torch.float32, device=scores.device)

    return Gumbel()


def _stop_ids(config: Any, tokenizer: Any) -> list[int]:
    stops = config.eos_token_id
    ids = [] if stops is None else list(stops) if isinstance(stops, list) else [stops]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return [int(token) for token in ids]


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a BOS before plain text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def hidden_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens that are no part of what a model says.

    Those that begin and end a thought are: without them a thought could not be told from an answer.
    """
    special = {int(token): str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    kept = MARK_TOKENS | (HARMONY_TOKENS if "<|channel|>" in special.values() else frozenset())
    return frozenset(token for token, text in special.items() if text not in kept)


def kv_bytes_per_token(model: Any) -> int:
    """Return the size of one token's keys and values over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def free_bytes(device: Any) -> int | None:
    """Return the memory free on a device, or None where it cannot be asked."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        # What can be had, page cache included; the count of free pages alone is far lower on a busy machine.
        [line] = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None


def _empty_cache(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def estimate_seconds(local: LocalModel, prompt_characters: Sequence[int], decoding: Decoding) -> float:
    """Return how long the prompts would take if every answer ran to the limit, from one short timed batch.

    The batch is of random tokens, so that no question is asked for the sake of the clock. Lengths are guessed at four
    characters per token plus a chat template's frame.
    """
    import torch

    lengths = sorted((characters // 4 + 32 for characters in prompt_characters), reverse=True)
    rows = min(len(lengths), local.rows_that_fit(lengths[0], decoding.max_new_tokens))
    middle = min(lengths[len(lengths) // 2], local.context - 16)
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, local.model.config.get_text_config().vocab_size, (rows, middle), generator=draws)
    prompts = [Prompt(str(i), "", row.tolist()) for i, row in enumerate(tokens)]
    seconds = []
    for new_tokens in (1, 1, 9):  # the first warms up
        start = time.perf_counter()
        local.answer(prompts, Decoding(max_new_tokens=new_tokens))
        seconds.append(time.perf_counter() - start)
    step = max(0.0, seconds[2] - seconds[1]) / 8
    return math.ceil(len(lengths) / rows) * (seconds[1] + step * (decoding.max_new_tokens - 1))


# -- loading -------------------------------------------------------------------------------------------------


def load_local(spec: LocalSpec, *, tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> LocalModel:
    """Return the model that `spec` names, loaded once, ready to answer. Raises RequestError.

    `tensors` are those of a recipe, where they are at hand; else they are computed.
    """
    from safetensors import SafetensorError

    transformers = import_transformers()
    spread = spec.device == SPREAD
    device, dtype = pick_device(spec.device), pick_dtype(spec)
    place: dict[str, Any] = {"device_map": "auto"} if spread else {}
    if spec.four_bit:  # which are made on the device itself
        place = {"device_map": place.get("device_map", {"": device}), "quantization_config": nf4(dtype)}
    files, revision = split_revision(files_of(spec))
    if not spec.is_recipe:
        refuse_pytorch(files, revision)
    # Said outright: where the choice is open, transformers asks at the terminal whether to run a model's own code.
    known = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(files, **known)
        if spec.is_recipe:
            model = _load_recipe(transformers, spec, tensors, dtype, place)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(files, dtype=dtype, **place, **known)
        if spec.is_adapter:
            model = _on_adapter(model, spec.model)
        if spec.chat_template is not None:
            tokenizer.chat_template = read_chat_template(spec.chat_template, tokenizer.get_vocab())
        if not spread and not spec.four_bit:
            model = model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        on = f" on its base {files} (--base names another place)" if spec.is_adapter else ""
        raise RequestError(
            f"{spec.model}{on}: cannot be loaded as a causal language model: {why_not(error)}"
        ) from error
    homes = {str(home) for home in getattr(model, "hf_device_map", {}).values()}
    if spread and device.type != "cpu" and homes & {"cpu", "disk"}:
        raise RequestError(f"{spec.model} does not fit on the GPUs here; serve it elsewhere and give --base-url")
    return LocalModel(model, tokenizer, name=spec.model, batch_rows=spec.batch_rows)


def why_not(error: Exception) -> str:
    """Return why a model could not be loaded and what to do, where that is known."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"it does not fit; --device {SPREAD} spreads it over every GPU, --base-url asks a server that has it"
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run here; serve it and name the server with --base-url"
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed: {' '.join(str(error).split())}"
    return str(error)


def import_transformers() -> Any:
    """Return the transformers package, quiet. Raises RequestError."""
    try:
        import transformers
    except ImportError as error:
        raise RequestError("a local model needs transformers: pip install 'resta[redeval]'") from error
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def files_of(spec: LocalSpec) -> str:
    """Return where config and tokenizer come from: the directory, the adapter's base, or the recipe's `files`."""
    if spec.is_recipe:
        if spec.files is None:
            raise RequestError(f"{spec.model}: an unwritten merge needs --files DIR, a folder of config and tokenizer")
        return spec.files
    if not spec.is_adapter:
        return spec.model
    if spec.base is not None:
        return spec.base
    file = Path(spec.model) / "adapter_config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not a readable adapter configuration: {error}") from error
    named = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    if not named:
        raise RequestError(f"{spec.model}: the adapter does not name its base model; name it with --base")
    return str(named)


def split_revision(name: str) -> tuple[str, str]:
    """Split NAME@REVISION; a directory is never split, and no revision means "main"."""
    if not Path(name).exists() and "@" in name:
        name, revision = name.rsplit("@", 1)
        return name, revision
    return name, "main"


def _on_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RequestError("an adapter needs peft: pip install 'resta[redeval]'") from error
    return PeftModel.from_pretrained(model, adapter)


def _load_recipe(
    transformers: Any, spec: LocalSpec, tensors: Iterable[tuple[str, torch.Tensor]] | None, dtype: Any, place: Any
) -> Any:
    """Return the model that a recipe makes; every tensor must find its place and every place its tensor."""
    from resta.engine import tensors as compute

    files, revision = split_revision(files_of(spec))
    config = transformers.AutoConfig.from_pretrained(files, revision=revision, trust_remote_code=False)
    state = dict(compute(spec.model) if tensors is None else tensors)
    if dtype == "auto":
        dtype = next(iter(state.values())).dtype
    # The auto class insists on a path; the class that it would pick takes a state alone.
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **place
    )
    wrong = {kind: names for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        raise RequestError(f"{spec.model}: the merge does not fit the config in {files}: {wrong}")
    if (Path(files) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(files)
    return model


def pick_device(name: str) -> Any:
    """Return the torch device: the named one, else CUDA, MPS or CPU, whichever comes first. Raises RequestError."""
    import torch

    if name not in ("auto", SPREAD):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RequestError(f"unknown device {name!r}: {error}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RequestError(f"device {name!r}: torch sees no CUDA GPU here")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(spec: LocalSpec) -> Any:
    """Return the torch dtype; "auto" keeps the checkpoint's own."""
    import torch

    names = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if spec.dtype not in names:
        raise RequestError(f"unknown dtype {spec.dtype!r}; one of {', '.join(names)}")
    return names[spec.dtype]


def fingerprint(spec: LocalSpec) -> dict[str, str]:
    """Return what identifies a local model: a Hub id as it stands; for directories a digest of names, sizes, small
    files and 16 evenly spread blocks of each weight file (a whole 70B would take minutes to read).
    """
    places = {"model": spec.model, "files": files_of(spec)}
    prints = {}
    for role, place in places.items():
        path = Path(place)
        if path.is_dir():
            prints[role] = folder_fingerprint(path)
        elif path.is_file():
            prints[role] = sha256_file(path)
    if spec.is_recipe:  # which says what is done to its models, not what they are
        prints |= {f"model {name}": folder_fingerprint(folder) for name, folder in _merged(Path(spec.model)).items()}
    if spec.chat_template is not None:
        text = (
            named_template(spec.chat_template)
            if spec.chat_template in NAMED
            else read_chat_template(spec.chat_template, ())
        )
        prints["chat_template"] = sha256_text(text)
    return prints


def _merged(recipe: Path) -> dict[str, Path]:
    """Return the local directories of a recipe's models, by name; those of the Hub are left out."""
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    models = found.get("models") if isinstance(found, dict) else None
    sources = {
        str(name): str(model.get("source") if isinstance(model, dict) else model)
        for name, model in (models.items() if isinstance(models, dict) else ())
    }
    return {name: Path(source) for name, source in sorted(sources.items()) if Path(source).is_dir()}


# -- sequence classifiers ------------------------------------------------------------------------------------


def read_tokenizer(spec: LocalSpec) -> Any:
    """Return a model's tokenizer, without its weights. Raises RequestError."""
    files = files_of(spec)
    name, revision = split_revision(files)
    try:
        if not Path(name).exists():
            check_there(files)
        return import_transformers().AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (RequestError, OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(f"{spec.model}: its tokenizer cannot be loaded: {why_not(error)}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassifier:
    """A sequence classifier in this process, loaded once."""

    name: str
    tokenizer: Any
    model: Any


def load_classifier(spec: LocalSpec) -> TextClassifier:
    """Return the sequence classifier that `spec` names. Raises RequestError."""
    from safetensors import SafetensorError

    transformers = import_transformers()
    name, revision = split_revision(spec.model)
    refuse_pytorch(name, revision)
    tokenizer = read_tokenizer(spec)
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
        model = model.eval().to(pick_device(spec.device))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"{spec.model}: cannot be loaded as a sequence classifier: {why_not(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return TextClassifier(name=spec.model, tokenizer=tokenizer, model=model)


def classify(
    classifier: TextClassifier, texts: Sequence[str], *, multi_label: bool, rows: int = ROWS
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (index of text, {label: share}), longest texts first. Raises RequestError.

    Shares are sigmoids where several labels may hold, else a softmax. A text is never cut: too long is an error.
    """
    import torch

    tokenizer, model = classifier.tokenizer, classifier.model
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if order and len(encoded[order[0]]) > limit:
        raise RequestError(f"{classifier.name}: a text of {len(encoded[order[0]])} tokens exceeds its {limit}")
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        padded = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**padded).logits.float()
        shares = (logits.sigmoid() if multi_label else logits.softmax(dim=-1)).tolist()
        for i, row in zip(batch, shares, strict=True):
            yield i, {model.config.id2label[k]: share for k, share in enumerate(row)}
