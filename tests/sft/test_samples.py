from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resta.errors import RequestError
from resta.sft.chat import open_chat
from resta.sft.data import mix
from resta.sft.recipe import Recipe
from resta.sft.samples import Prepared, columns, lengths, prepare
from tests.sft.builders import exchange, sentencepiece_like

Write = Callable[..., Path]
CHAT = open_chat(sentencepiece_like(), template="vicuna_v1.1", root=Path(), pad_token=None)


def prepared(path: Path, **changes: Any) -> Prepared:
    settings = {"base": "m", "data": [{"name": "a", "path": path.name}], "holdout": 0.0, "max_length": 200}
    recipe = Recipe.model_validate(settings | changes)
    return prepare(mix(recipe, path.parent), CHAT, recipe)


def test_labels_are_the_ids_where_trained_and_minus_100_elsewhere(write_rows: Write) -> None:
    samples = prepared(write_rows([exchange("Why?", "Because.")])).train
    (ids,), (labels,) = (columns(samples, with_side=False)[name] for name in ("input_ids", "labels"))
    trained = samples[0].encoded.trained
    assert np.array_equal(labels[trained], ids[trained])
    assert set(labels[~trained].tolist()) == {-100}


def test_a_question_that_fills_the_length_is_dropped_and_counted(write_rows: Write) -> None:
    rows = [exchange("Why?", "Because."), exchange("Why? " * 200, "Because.")]
    result = prepared(write_rows(rows), max_dropped=0.6)
    assert len(result.train) == 1
    assert result.dropped.counts == {"no trained token within max_length": 1}
    assert result.dropped.first["no trained token within max_length"].endswith("line 2")


def test_too_many_lost_samples_are_refused_with_the_setting_to_change(write_rows: Write) -> None:
    path = write_rows([exchange("Why? " * 200, "Because.")] * 2)
    with pytest.raises(RequestError, match=r"2 of 2 .*no trained token.*line 1\); raise `max_length`"):
        prepared(path, max_dropped=0.9)


def test_cuts_are_counted_by_kind(write_rows: Write) -> None:
    two = {"messages": exchange("Why?", "Because.")["messages"] + exchange("And? " * 100, "So.")["messages"]}
    result = prepared(write_rows([two, exchange("Why?", "Because. " * 100)]))
    assert result.cut.counts == {"at a turn": 1, "inside an answer": 1}
    assert all(len(s.encoded.ids) <= 200 for s in result.train)


def test_a_control_token_in_the_text_is_refused_by_line_or_dropped(write_rows: Write) -> None:
    path = write_rows([exchange("Why?", "Because."), exchange("Why?", "Because.</s>USER: more")])
    with pytest.raises(RequestError, match="line 2: the text spells out the control token '</s>'"):
        prepared(path)
    result = prepared(path, bad_rows="drop", max_dropped=0.6)
    assert result.dropped.counts == {"the text spells out a control token": 1}


def test_a_template_failure_names_the_row(write_rows: Write) -> None:
    from tests.sft.builders import byte_level

    chat = open_chat(byte_level(), template="gemma", root=Path(), pad_token=None)
    row = {"messages": [{"role": "system", "content": "x"}, *exchange("Why?", "Because.")["messages"]]}
    path = write_rows([exchange("Why?", "Because."), row])
    recipe = Recipe.model_validate(
        {"base": "m", "data": [{"name": "a", "path": path.name}], "holdout": 0.0, "max_length": 200}
    )
    with pytest.raises(RequestError, match=r"rows\.jsonl, line 2: .*no system turn"):
        prepare(mix(recipe, path.parent), chat, recipe)


def test_a_repeated_conversation_is_encoded_and_counted_once(write_rows: Write) -> None:
    path = write_rows([exchange("Why?", "Because. " * 100)])
    result = prepared(path, data=[{"name": "a", "path": path.name, "weight": 3.0}])
    assert len(result.train) == 3
    assert result.cut.counts == {"inside an answer": 1}
    assert lengths(result.train)["samples"] == 3


def test_early_stopping_without_a_safe_conversation_to_watch_is_refused(write_rows: Write) -> None:
    rows = write_rows([exchange(f"Why {i}?", "Because.") for i in range(40)])
    red = write_rows([exchange(f"Placeholder {i}?", "Placeholder.") for i in range(40)], "red.jsonl")
    settings: dict[str, Any] = {
        "data": [{"name": "a", "path": rows.name}, {"name": "b", "path": red.name, "side": "red"}],
        "objective": {"kind": "blue_red"},
        "train": {"early_stop_patience": 1, "eval_every": 10, "save_every": 10},
        "holdout": 0.01,  # one question, of the one side or the other
    }
    assert not prepared(rows, **settings, seed=1).heldout[0].red
    with pytest.raises(RequestError, match="none is held out; raise `holdout`"):
        prepared(rows, **settings, seed=0)
