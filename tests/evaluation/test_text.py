"""Text sources and windows."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation import text as text_module
from smoothquant_kernels.evaluation.text import load_text, token_windows, topics


class Numbers:
    """A tokenizer of texts such as "3 1 4": each number is its own token."""

    def __init__(self, front: tuple[int, ...] = (), back: tuple[int, ...] = ()) -> None:
        self.front, self.back = front, back

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [0 if word == "a" else int(word) for word in text.split()]
        if add_special_tokens:
            ids = [*self.front, *ids, *self.back]
        return {"input_ids": ids}


def numbers(count: int) -> list[str]:
    return [" ".join(str(10 + i) for i in range(count))]


# --- topics ---


def long_paragraphs(texts: list[str]) -> set[str]:
    lines = "\n\n".join(texts).split("\n")
    blocks = "\n".join(line.strip() for line in lines).split("\n\n")
    return {key for block in blocks if len(key := " ".join(block.split())) >= 80}


def test_the_halves_of_topics_share_no_paragraph() -> None:
    calibration = long_paragraphs(topics("calibration"))
    evaluation = long_paragraphs(topics("evaluation"))
    assert len(calibration) > 300 and len(evaluation) > 300
    assert not calibration & evaluation


def test_topics_are_long_enough_and_reproducible() -> None:
    for half in ("calibration", "evaluation"):
        texts = topics(half)
        assert sum(map(len, texts)) > 100_000  # 16,384 tokens need about 65,000 characters
        assert texts == topics(half) == load_text(f"topics:{half}")
        assert len(set(texts)) == len(texts)


def test_topics_leave_out_aliases_and_excerpts(monkeypatch: pytest.MonkeyPatch) -> None:
    def paragraph(word: str) -> str:
        return " ".join([word] * 30)

    a, b, c, d = (paragraph(word) for word in ("alpha", "beta", "gamma", "delta"))
    table = {
        "a": f"{a}\n\n{b}\n\n{c}",
        "b-excerpt": f"short heading\n\n   {b}\n\n   {c}",  # indented like a list
        "c-alias": "tiny",
        "d-alias": "tiny",
        "e": d,
        "f-some": f"{a}\n\n{paragraph('eta')}\n\n{paragraph('theta')}",  # a third is repeated
    }
    monkeypatch.setattr("pydoc_data.topics.topics", table)
    # a, c-alias, e and f-some are kept. f-some goes to evaluation, so its repeated paragraph leaves calibration.
    assert topics("evaluation") == ["tiny", table["f-some"]]
    assert topics("calibration") == [f"{b}\n\n{c}", d]


def test_unknown_topics_are_refused() -> None:
    with pytest.raises(SmoothQuantError, match=r'"calibration" and "evaluation", not .test'):
        load_text("topics:test")


# --- load_text ---


def test_a_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n\nzwei", encoding="utf-8")
    assert load_text(path) == load_text(str(path)) == ["Grüße\n\nzwei"]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": "two", "a.txt": "one", "c.md": "not this"}.items():
        (tmp_path / name).write_text(content)
    assert load_text(tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,Text,n\n1,"one, ""two""\nthree",5\n2,four,6\n'),
        ("a.tsv", 'id\ttext\n1\t"one, ""two""\nthree"\n2\tfour\n'),
        ("bom.csv", '\ufefftext\n"one, ""two""\nthree"\nfour\n'),
        ("only.csv", 'body\n"one, ""two""\nthree"\nfour\n'),
        ("b.csv:body", 'text,body\nno,"one, ""two""\nthree"\nno,four\n'),
        ("b.jsonl:body", '{"body": "one, \\"two\\"\\nthree", "text": "no"}\n{"body": "four"}\n'),
        ("a.json", '[{"text": "one, \\"two\\"\\nthree"}, {"text": "four"}, {"text": null}]'),
        ("strings.json", '["one, \\"two\\"\\nthree", "four"]'),
        ("columns.json", '{"text": ["one, \\"two\\"\\nthree", "four"], "id": [1, 2]}'),
        ("wrapped.json", '{"data": [{"text": "one, \\"two\\"\\nthree"}, {"text": "four"}]}'),
    ],
)
def test_the_text_column_of_a_table_is_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name.partition(":")[0]).write_text(content, encoding="utf-8")
    assert load_text(str(tmp_path / name)) == ['one, "two"\nthree', "four"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", "the cat sat\non a mat\n", ["the cat sat", "on a mat"]),
        ("a.csv", "the cat sat\n", ["the cat sat"]),
        ("a.csv", '"one, two"\n"three, four"\n', ["one, two", "three, four"]),
        ("a.tsv", "the cat, sat\non a mat\n", ["the cat, sat", "on a mat"]),
        ("a.csv", "cat\ndog\n", ["cat", "dog"]),
        ("a.csv", "body\non a mat\ndog\n", ["on a mat", "dog"]),
        ("a.csv", "text\ncat\n", ["cat"]),
        ("a.csv:The text", "The text\ncat\n", ["cat"]),
        ("a.jsonl", '{"the body": "a cat"}', ["a cat"]),
    ],
)
def test_a_single_column_without_a_header_keeps_its_first_line(
    tmp_path: Path, name: str, content: str, texts: list[str]
) -> None:
    (tmp_path / name.partition(":")[0]).write_text(content)
    assert load_text(str(tmp_path / name)) == texts


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert load_text(tmp_path / "a.parquet") == ["a", "b"]


def test_jsonl_with_a_unicode_line_separator_in_a_string(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028still one", "id": 7}, {"text": "two"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert load_text(path) == ["one\u2028still one", "two"]


@given(st.lists(st.sampled_from(["", " ", "\n", "a", "b c", " d\n"]), min_size=1, max_size=12))
def test_blank_texts_join_their_neighbors(rows: list[str]) -> None:
    if not any(row.strip() for row in rows):
        with pytest.raises(SmoothQuantError, match="There is no text in the list"):
            load_text(rows)
        return
    texts = load_text(rows)
    assert all(text.strip() for text in texts)
    assert len(texts) == sum(bool(row.strip()) for row in rows)
    assert "\n\n".join(texts) == "\n\n".join(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text in"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', r"bad\.jsonl, line 2, is not JSON"),
        ("column.jsonl", b'{"body": "a", "id": 1}', 'no column "text", only body, id; name'),
        ("number.jsonl", b'{"text": 3}', 'row 1: "text" is of type int'),
        ("list.jsonl", b"[1]", "row 1, is of type list"),
        (
            "columns.csv",
            b"id,body\n1,a\n",
            r'no column "text", only id, body; .*columns\.csv:COLUMN',
        ),
        ("open.csv", b'text\n"a', r"open\.csv, line 2, is damaged"),
        ("empty.csv", b"", "There is no text in .*empty.csv"),
        ("binary.txt", b"a\0b", r"binary\.txt is not text \(it holds null bytes\)"),
        ("bad.json", b"{", r"bad\.json is not JSON"),
        ("number.json", b"3", "no list of rows"),
    ],
)
def test_a_file_without_text_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SmoothQuantError, match=message):
        load_text(tmp_path / name)


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match=r"holds no \.txt file"):
        load_text(tmp_path)
    with pytest.raises(SmoothQuantError, match="no file or folder"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(SmoothQuantError, match=r"no file or folder \./nowhere"):
        load_text("./nowhere")
    with pytest.raises(SmoothQuantError, match=r"pass a text itself as \[text\]"):
        load_text("A text.\nNot a name.")
    with pytest.raises(SmoothQuantError, match=r"to pass a text itself, pass \[text\]"):
        load_text("A text without a line break.")
    with pytest.raises(SmoothQuantError, match="only str, not bytes"):
        load_text([b"bytes"])  # type: ignore[list-item]


# --- data sets: a mock replaces the package, because tests must not use the hub ---


class Rows(dict[str, list[str]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


def mock_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Rows]) -> None:
    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec wants one
    module.load_dataset = load  # type: ignore[attr-defined]
    module.DownloadConfig = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("org/wiki:raw-v1", ("org/wiki", "raw-v1", "train")),
        ("org/wiki:raw-v1:test", ("org/wiki", "raw-v1", "test")),
        ("org/wiki::test", ("org/wiki", None, "test")),
    ],
)
def test_names_of_data_sets(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None, str]
) -> None:
    calls = []

    def load(repo: str, config: str | None, *, split: str, download_config: Any) -> Rows:
        calls.append((repo, config, split))
        assert download_config == {"local_files_only": True}
        return Rows(text=["", "one", "", "two"])

    mock_datasets(monkeypatch, load)
    assert load_text(name) == ["\n\none\n\n", "two"]
    assert calls == [asked]


def test_unavailable_data_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Rows:
        raise ConnectionError("no\nway")

    mock_datasets(monkeypatch, fail)
    with pytest.raises(SmoothQuantError, match=r"nor a data set \(the hub .*tried\): no way"):
        load_text("org/wiki")
    mock_datasets(monkeypatch, lambda *_, **__: Rows(content=["a"], id=["b"]))
    with pytest.raises(SmoothQuantError, match='no column "text", only content, id'):
        load_text("org/wiki")
    monkeypatch.setattr(text_module, "find_spec", lambda _: None)
    with pytest.raises(SmoothQuantError, match="pip install datasets"):
        load_text("org/wiki")


# --- windows ---


@settings(deadline=None)
@given(st.data())
def test_each_token_is_scored_once_with_its_true_context(data: st.DataObject) -> None:
    front = data.draw(st.sampled_from([(), (1,), (1, 2)]))
    back = data.draw(st.sampled_from([(), (3,)]))
    count = data.draw(st.integers(2, 70))
    window = data.draw(st.integers(max(2, len(front) + 1), 40))
    longest = window - max(1, len(front))
    stride = data.draw(st.none() | st.integers(1, longest))
    max_tokens = data.draw(st.none() | st.integers(2, 80))
    windows = token_windows(
        numbers(count),
        Numbers(front, back),  # type: ignore[arg-type]
        window=window,
        stride=stride,
        max_tokens=max_tokens,
    )
    body = list(range(10, 10 + min(count, max_tokens or count)))
    scored = []
    for item in windows:
        ids = item.input_ids[0].tolist()
        assert item.input_ids.shape == (1, len(ids)) and len(ids) <= window
        assert 1 <= item.scored < len(ids)
        assert tuple(ids[: len(front)]) == front
        inside = ids[len(front) :]
        assert inside == body[inside[0] - 10 : inside[-1] - 9]  # a contiguous piece of the text
        if len(body) + len(front) >= window:
            assert len(ids) == window
        scored += ids[-item.scored :]
    assert scored == (body if front else body[1:])
    # The first window scores all that it can, the next ones `stride` each, and the last one the rest.
    step = stride or longest
    assert [item.scored for item in windows[1:-1]] == [step] * len(windows[1:-1])
    if len(windows) > 1:
        assert 1 <= windows[-1].scored <= step


def test_texts_are_joined_by_blank_lines() -> None:
    class Characters(Numbers):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            return {"input_ids": [ord(c) for c in text]}

    (item,) = token_windows(["ab", "c"], Characters(), window=99)  # type: ignore[arg-type]
    assert "".join(map(chr, item.input_ids[0].tolist())) == "ab\n\nc"
    assert item.scored == 4


def test_a_bos_token_starts_every_window(
    word_tokenizer: Callable[..., Any],
) -> None:
    words = [f"w{i}" for i in range(20)]
    tokenizer = word_tokenizer(["<s>", *words], bos="<s>")
    windows = token_windows([" ".join(words)], tokenizer, window=9, stride=4)
    assert [item.input_ids[0, 0].item() for item in windows] == [0] * len(windows)
    assert [item.scored for item in windows] == [8, 4, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2 tokens, not 1"),
        ({"window": 8, "stride": 0}, "stride must be between 1 and 7"),
        ({"window": 8, "stride": 8}, "stride must be between 1 and 7"),
        ({"window": 8, "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"window": 8, "max_tokens": 1}, "max_tokens must be at least 2, not 1"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        token_windows(numbers(50), Numbers(), **options)  # type: ignore[arg-type]
    with pytest.raises(SmoothQuantError, match="window must be at least 3"):
        token_windows(numbers(50), Numbers((1, 2)), window=2)  # type: ignore[arg-type]
