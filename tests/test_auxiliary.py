"""The small files of the output: bytes kept, the dtype alone corrected, and tokenizers that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

from resta.adapter import read_adapter
from resta.auxiliary import AuxiliaryFile, plan_auxiliary_files, read_auxiliary_files, tokenizer_conflict
from resta.checkpoint import Weights, read_weights
from resta.errors import RequestError
from resta.hub import locate
from tests.builders import save_model

ODD_CONFIG = """{
\t"zeta_first": [1.0, 1e5,  2],
  "rope_theta": 1000000.0,   "rope_scaling": null,
  "rope_parameters" : {"rope_theta":1e6},
  "torch_dtype"  :"float16",
  "model_type": "llama", "note": "dtype: float16, \\"dtype\\": \\"float16\\", \\u00e9 é",
  "text_config": {"dtype": "bfloat16", "hidden_size": 64}, "vision_config": {"torch_dtype":
      "float32"},
  "alpha_last": true }

"""
CORRECTED = (
    ODD_CONFIG.replace('"torch_dtype"  :"float16"', '"torch_dtype"  :"float32"')
    .replace('"dtype": "bfloat16", "hidden_size"', '"dtype": "float32", "hidden_size"')
)  # fmt: skip


def model(folder: Path, **files: str | bytes) -> Weights:
    """A model directory with these files beside its weights; names are written with __ for the dot."""
    save_model(folder, {"w": torch.ones(2)})
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_DIR_", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_weights(locate(str(folder)))


def planned(donor: Weights, dtypes: Any) -> tuple[tuple[AuxiliaryFile, ...], tuple[str, ...]]:
    """The files that a result gets from a donor, and the names left out."""
    found, left_out = read_auxiliary_files(donor)
    return plan_auxiliary_files(found, dtypes, is_untied=donor.is_untied), left_out


def files_of(donor: Weights, dtypes: Any = (("F32", 8),)) -> dict[str, bytes]:
    return {file.name: file.content for file in planned(donor, dtypes)[0]}


def test_the_config_keeps_every_byte_but_those_of_the_dtype(tmp_path: Path) -> None:
    assert CORRECTED != ODD_CONFIG
    donor = model(tmp_path / "m", config__json=ODD_CONFIG)
    assert files_of(donor)["config.json"].decode() == CORRECTED
    assert json.loads(CORRECTED)["note"] == json.loads(ODD_CONFIG)["note"]


@given(dtypes=st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "F16", "I64", "BOOL"]), st.integers(0, 9))))
def test_the_dtype_is_that_of_most_bytes_and_the_rest_of_the_text_is_untouched(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("models") / "m"
    content = files_of(model(folder, config__json=ODD_CONFIG), dtypes)["config.json"].decode()
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    sizes = {names[dtype]: sum(n for other, n in dtypes if other == dtype) for dtype, _ in dtypes if dtype in names}
    if not sizes:
        assert content == ODD_CONFIG
        return
    chosen = json.loads(content)["torch_dtype"]
    assert sizes[chosen] == max(sizes.values())
    assert content == CORRECTED.replace("float32", chosen)


def test_a_config_without_a_dtype_gets_none(tmp_path: Path) -> None:
    text = '{"model_type": "llama", "rope_theta": 500000.0}'
    assert files_of(model(tmp_path / "m", config__json=text))["config.json"].decode() == text


def test_transformers_reads_from_the_copied_config_what_it_reads_from_the_original(tmp_path: Path) -> None:
    donor = model(tmp_path / "m")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_bytes(files_of(donor, [("F16", 4)])["config.json"])
    original, copied = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("m", "copy"))
    assert copied.pop("dtype") in ("float16", torch.float16)
    assert original.pop("dtype") in ("bfloat16", torch.bfloat16)
    original.pop("_name_or_path", None)
    copied.pop("_name_or_path", None)
    assert copied == original


def test_tokenizer_templates_and_licences_are_copied_and_everything_else_is_left_out(tmp_path: Path) -> None:
    wanted = ["generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt", "x.tiktoken"]
    wanted += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE", "NOTICE.md"]
    named = ["modeling_x.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "run.sh", "logs.csv"]
    named += ["train.txt", "predictions.json", "trainer_state.json", "all_results.json"]
    silent = ["README.md", "resta.json", "adapter_config.json", "pytorch_model.bin.index.json"]
    model(tmp_path / "m")
    for name in (*wanted, *named, *silent, "checkpoint-1/config.json"):
        path = tmp_path / "m" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() + b"\r\n\xff")
    donor = read_weights(locate(str(tmp_path / "m")))
    files, left_out = planned(donor, [])
    assert {file.name for file in files} == {"config.json", *wanted}
    assert all(file.content == file.name.encode() + b"\r\n\xff" for file in files if file.name != "config.json")
    assert set(left_out) == set(named)


def test_what_does_not_belong_to_a_model_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = model(tmp_path / "m", train__txt="secret", tokenizer__json="{}")
    opened = []
    monkeypatch.setattr("resta.auxiliary.read_regular", lambda path, most: opened.append(path.name) or b"{}")
    assert planned(donor, [])[1] == ("train.txt",)
    assert sorted(opened) == ["config.json", "tokenizer.json"]


AUTO_MAPS = {
    "first": ('{"auto_map": {"AutoModel": "modeling_x.X"},\n "a": 1}', '{\n "a": 1}'),
    "last": ('{"a": 1,\n "auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}\n}', '{"a": 1}'),
    "middle": ('{"a": 1, "auto_map": {"AutoModel": "modeling_x.X"}, "b": [2e0]}', '{"a": 1, "b": [2e0]}'),
    "elsewhere": ('{"auto_map": {"AutoModel": "org/x--modeling_x.X"}}', None),
    "empty": ('{"auto_map": {}}', None),
    "in a text": ('{"a": "auto_map: {x.y}", "b": "\\"auto_map\\": {}"}', None),
    "odd": ('{"auto_map": [3]}', None),
}


@pytest.mark.parametrize("case", AUTO_MAPS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_map_goes_with_the_code_that_it_names(tmp_path: Path, case: str, name: str) -> None:
    text, expected = AUTO_MAPS[case]
    donor = model(tmp_path / "m", **{"modeling_x__py": "raise SystemExit", name.replace(".", "__"): text})
    files, left_out = planned(donor, [])
    content = next(file.content for file in files if file.name == name).decode()
    assert json.loads(content) == json.loads(expected or text)
    assert (content == text) == (expected is None)
    assert any("auto_map" in line for line in left_out) == (expected is not None)
    assert "modeling_x.py" in left_out


def test_a_model_that_named_code_beside_it_is_loaded_without_it(tmp_path: Path) -> None:
    donor = model(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_bytes(files_of(donor)["config.json"])
    assert AutoConfig.from_pretrained(tmp_path / "copy", trust_remote_code=True).model_type == "llama"


def test_a_side_file_that_is_a_link_out_of_the_directory_is_left_out_by_name(tmp_path: Path) -> None:
    donor = model(tmp_path / "m", tokenizer__json="{}")
    (tmp_path / "secret.json").write_text("secret")
    (tmp_path / "m" / "vocab.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "m" / "vocab.txt").symlink_to("tokenizer.json")
    files, left_out = planned(donor, [])
    assert {file.name for file in files} == {"config.json", "tokenizer.json", "vocab.txt"}
    assert left_out == ("vocab.json",)


def adapter(folder: Path, base: Weights, **files: str) -> Weights:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base.located.folder.name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.w": torch.zeros(2)}, folder / "adapter_model.safetensors")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return read_adapter(locate(str(folder)), base)


def test_an_adapters_tokenizer_wins_over_its_bases_and_its_config_does_not(tmp_path: Path) -> None:
    base = model(tmp_path / "b", tokenizer__json="base", vocab__txt="base", config__json='{"model_type": "llama"}')
    mounted = adapter(
        tmp_path / "a", base, tokenizer__json="own", chat_template__jinja="own", config__json='{"model_type": "gpt2"}'
    )
    found = files_of(mounted)
    assert found["tokenizer.json"] == found["chat_template.jinja"] == b"own"
    assert found["vocab.txt"] == b"base"
    assert found["config.json"] == b'{"model_type": "llama"}'
    assert found.keys() == {"tokenizer.json", "chat_template.jinja", "vocab.txt", "config.json"}


# ---- tokenizers


def bpe(vocab: dict[str, Any], added: dict[str, Any] | None = None) -> str:
    entries = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    return json.dumps({"added_tokens": entries, "model": {"type": "BPE", "vocab": vocab, "merges": []}})


def unigram(tokens: list[str]) -> str:
    return json.dumps({"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}})


CONFLICTS = {
    "same bytes": (bpe({"a": 0}), bpe({"a": 0}), None),
    "other spelling": (bpe({"a": 0, "b": 1}), bpe({"b": 1, "a": 0}) + "\n", None),
    "extended": (bpe({"a": 0}), bpe({"a": 0, "b": 1}), None),
    "extended by added tokens": (bpe({"a": 0}), bpe({"a": 0}, {"<x>": 1}), None),
    "the same token, added or not": (bpe({"a": 0, "<x>": 1}), bpe({"a": 0}, {"<x>": 1}), None),
    "disjoint": (bpe({"a": 0}), bpe({"b": 1}), None),
    "swapped": (bpe({"a": 0, "b": 1}), bpe({"a": 1, "b": 0}), "id 0 is 'b', not 'a' (2 ids differ)"),
    "one differs": (bpe({"a": 0, "b": 7}), bpe({"a": 0, "c": 7}), "id 7 is 'c', not 'b' (1 ids differ)"),
    "added tokens differ": (bpe({}, {"<x>": 5}), bpe({}, {"<y>": 5}), "id 5 is '<y>', not '<x>' (1 ids differ)"),
    "an added token hides one": (bpe({"a": 0}), bpe({"a": 0}, {"<x>": 0}), "id 0 is '<x>', not 'a' (1 ids differ)"),
    "Unigram alike": (unigram(["a", "b"]), unigram(["a", "b", "c"]), None),
    "Unigram differs": (unigram(["a", "b"]), unigram(["a", "c"]), "id 1 is 'c', not 'b' (1 ids differ)"),
    "Unigram and BPE alike": (unigram(["a", "b"]), bpe({"b": 1, "a": 0}), None),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_tokenizers_conflict_where_a_shared_id_means_different_tokens(tmp_path: Path, case: str) -> None:
    mine, theirs, expected = CONFLICTS[case]
    pair = (model(tmp_path / "mine", tokenizer__json=mine), model(tmp_path / "theirs", tokenizer__json=theirs))
    assert tokenizer_conflict(*pair) == expected


def test_a_model_without_a_tokenizer_conflicts_with_none(tmp_path: Path) -> None:
    pair = (model(tmp_path / "mine", tokenizer__json=bpe({"a": 0})), model(tmp_path / "theirs"))
    assert tokenizer_conflict(*pair) is None
    assert tokenizer_conflict(*pair[::-1]) is None


def test_the_tokenizer_of_an_adapter_is_its_own_where_it_has_one(tmp_path: Path) -> None:
    base = model(tmp_path / "b", tokenizer__json=bpe({"a": 0}))
    assert tokenizer_conflict(base, adapter(tmp_path / "without", base)) is None
    own = adapter(tmp_path / "with", base, tokenizer__json=bpe({"b": 0}))
    assert tokenizer_conflict(base, own) == "id 0 is 'b', not 'a' (1 ids differ)"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", "{}", '{"model": 3}', '{"model": {"vocab": 3}}', '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {"a": [0]}}}', '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": {}}, "added_tokens": 3}', '{"model": {"vocab": {}}, "added_tokens": [{"content": "x"}]}',
        '{"model": {"vocab": {}}, "added_tokens": [{"id": {}, "content": "x"}]}', '{"model": {}, "model": {}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_one_typed_error_that_names_it(tmp_path: Path, text: str) -> None:
    pair = (model(tmp_path / "mine", tokenizer__json=bpe({"a": 0})), model(tmp_path / "theirs", tokenizer__json=text))
    with pytest.raises(RequestError, match=r"theirs/tokenizer\.json"):
        tokenizer_conflict(*pair)
