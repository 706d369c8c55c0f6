"""Text for calibration and evaluation, and how it is cut into windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.models import hub_is_reachable
from smoothquant_kernels.evaluation.tables import is_table, read_table, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Window", "load_text", "token_windows", "topics"]

Half = Literal["calibration", "evaluation"]

# Shorter paragraphs ("For example:", "Changed in version 3.9:") recur in any technical text, so copies of them do not
# count as shared text.
_LONG_PARAGRAPH = 80


def topics(half: Half) -> list[str]:
    """Half of the Python language reference that every Python ships in `pydoc_data`: English prose with code.

    Of the sorted names, the even topics are for calibration and the odd ones for evaluation. Many topics are excerpts
    of others ("for" of "compound") or second names of the same text ("else", "if"). So a topic that mostly repeats
    longer ones is left out before the split. A paragraph that is still in both halves is removed from the calibration
    half. The text depends on the running Python, so compare numbers within one minor version only.

    Args:
        half: "calibration" or "evaluation".

    Returns:
        One text per topic, in a fixed order.

    Raises:
        SmoothQuantError: `half` is another word, or this Python lacks `pydoc_data`.

    Equivalent to:
        names = sorted(name for name in table if not mostly_in_longer_topics(name))
        [table[name] for name in names[half == "evaluation" :: 2]]

    Source: https://docs.python.org/3/reference/
    """
    if half not in get_args(Half):
        raise SmoothQuantError(
            f'The halves of topics are "calibration" and "evaluation", not {half!r}.'
        )
    try:
        from pydoc_data.topics import topics as table
    except ImportError as error:
        raise SmoothQuantError(
            "This Python has no pydoc_data module; give a text file instead of topics."
        ) from error
    names = _without_excerpts(table)
    evaluation = [table[name] for name in names[1::2]]
    if half == "evaluation":
        return evaluation
    return _without_shared_paragraphs([table[name] for name in names[0::2]], evaluation)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _key(paragraph: str) -> str | None:
    """The words of a paragraph, which its copies share whatever their indentation; None for a short paragraph."""
    words = " ".join(paragraph.split())
    return words if len(words) >= _LONG_PARAGRAPH else None


def _keys(text: str) -> set[str]:
    return {key for paragraph in _paragraphs(text) if (key := _key(paragraph)) is not None}


def _without_excerpts(table: Mapping[str, str]) -> list[str]:
    seen: set[str] = set()
    texts: set[str] = set()
    kept = []
    for name in sorted(table, key=lambda name: (-len(table[name]), name)):
        keys = _keys(table[name])
        repeated = sum(len(key) for key in keys & seen)
        # The second condition finds copies of a text that has no long paragraph.
        if 2 * repeated > sum(len(key) for key in keys) or table[name] in texts:
            continue
        kept.append(name)
        seen |= keys
        texts.add(table[name])
    return sorted(kept)


def _without_shared_paragraphs(texts: list[str], others: list[str]) -> list[str]:
    foreign = set().union(*map(_keys, others))
    return ["\n\n".join(p for p in _paragraphs(text) if _key(p) not in foreign) for text in texts]


def load_text(source: str | Path | Sequence[str]) -> list[str]:
    """Reads texts from any kind of source.

    Args:
        source: one of:
            a list of texts;
            a text file;
            a table (.csv, .tsv, .jsonl, .json, .parquet) with a column "text", or with only one column (with or without
            a name), or with the column named after a colon, as in "reviews.csv:body";
            a folder of .txt files;
            "topics:calibration" or "topics:evaluation" (see `topics`);
            the name of a data set on the Hugging Face hub with a column "text", as "name", "name:config" or
            "name:config:split" (by default, split is "train"), which needs the package datasets.

    Returns:
        The texts in order, at least one, each with a visible character. A blank text is merged into its neighbor, so
        joining the texts with blank lines gives the original.

    Raises:
        SmoothQuantError: there is no such source, it cannot be read as UTF-8, or it has no text.

    Equivalent to:
        [Path(source).read_text(encoding="utf-8")]
    """
    if not isinstance(source, str | Path):
        texts, name = list(source), "the list"
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise SmoothQuantError(
                f"A list of texts may hold only str, not {type(wrong[0]).__name__}."
            )
    else:
        texts, name = _read(source), str(source)
    if not any(text.strip() for text in texts):
        raise SmoothQuantError(f"There is no text in {name}.")
    return _without_blanks(texts)


def _without_blanks(rows: Sequence[str]) -> list[str]:
    """Attaches blank rows to their neighbors, so that `"\\n\\n".join` gives the same text.

    Published perplexities of WikiText join all of its rows, a third of which are empty.
    """
    texts: list[str] = []
    lead = ""
    for row in rows:
        if row.strip():
            texts.append(row if texts else lead + row)
        elif texts:
            texts[-1] += "\n\n" + row
        else:
            lead += row + "\n\n"
    return texts


def _read(source: str | Path) -> list[str]:
    name = str(source)
    if isinstance(source, str):
        if name.startswith("topics:"):
            return topics(name.removeprefix("topics:"))  # type: ignore[arg-type]  # checked there
        if not name.strip() or any(mark in name for mark in "\n\t"):
            raise SmoothQuantError(
                f"A source of text is a name, without line breaks, not {name[:60]!r}; pass a text itself as [text]."
            )
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise SmoothQuantError(
                f"The folder {path} holds no .txt file; give one that does, or a file."
            )
        return [read_utf8(file) for file in files]
    if path.is_file():
        return read_table(path) if is_table(path) else [read_utf8(path)]
    file, colon, column = name.rpartition(":")
    if colon and is_table(table := Path(file).expanduser()) and table.is_file():
        return read_table(table, column)
    if isinstance(source, Path) or not re.fullmatch(
        r"\w[\w.-]*(/\w[\w.-]*)?(:[^:/\s]*){0,2}", name
    ):
        raise SmoothQuantError(
            f"There is no file or folder {source}; give a text file, a table, a folder of .txt files or "
            "topics:calibration; to pass a text itself, pass [text]."
        )
    return _read_dataset(name)


def _read_dataset(name: str) -> list[str]:
    if find_spec("datasets") is None:
        raise SmoothQuantError(
            f"There is no file or folder {name}; if it is a data set on the Hugging Face hub, run "
            "`pip install datasets`."
        )
    repo, config, split = (*name.split(":"), "", "")[:3]
    rows: Any
    online = hub_is_reachable(repo, "dataset")
    try:
        import datasets

        download = datasets.DownloadConfig(local_files_only=not online)
        rows = datasets.load_dataset(
            repo, config or None, split=split or "train", download_config=download
        )
        columns = list(rows.column_names)
    except Exception as error:
        # The type of the error depends on the data set's format. Each error means that the data set is unavailable.
        reason = " ".join(str(error).split())[:300]
        where = "" if online else " (the hub cannot be reached; the local cache was tried)"
        raise SmoothQuantError(
            f"There is no file or folder {name}, nor a data set{where}: {reason}"
        ) from error
    if "text" not in columns:
        raise SmoothQuantError(
            f'The data set {name} has no column "text", only {", ".join(columns)}.'
        )
    return [str(text) for text in rows["text"]]


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of the token stream. A model reads all of it, and its last `scored` tokens count."""

    input_ids: torch.Tensor  # [1, T] int64
    scored: int  # 1 <= scored < T, because the first token has no context


def token_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> list[Window]:
    """Sliding windows over the texts, joined by blank lines, that score each token exactly once.

    The tokens that the tokenizer adds before a text (BOS, if it has one) start every window and are never scored. Those
    that it adds after a text (EOS) are left out. Without BOS, the first token of the text has no context and is the
    only one that is not scored.

    Args:
        texts: the texts.
        tokenizer: turns them into tokens.
        window: the tokens per window, BOS included; at least 2.
        stride: how many tokens each window after the first scores. None: as many as possible, `window - 1`. The windows
            then overlap in one token (or only in BOS), which is fastest. A smaller stride gives every token more
            context.
        max_tokens: use only this many tokens from the start of the text.

    Returns:
        The windows in the order of the text. All have `window` tokens unless the text is shorter. The last one reaches
        back as far as it can and scores the remaining tokens.

    Raises:
        SmoothQuantError: a size is out of range, or the text has no token to score.

    Equivalent to:
        ids = tokenizer("\\n\\n".join(texts)).input_ids[:max_tokens]
        ends = [window, window + stride, window + 2 * stride, ..., len(ids)]
        [Window(ids[end - window : end], scored=end - previous_end) for end in ends]

    Source: the strided evaluation of fixed-length models in the Hugging Face documentation, which loses the first token
        of each window when the stride equals the window.
    """
    front = len(prefix := front_tokens(tokenizer))
    if window < max(2, front + 1):
        raise SmoothQuantError(f"window must be at least {max(2, front + 1)} tokens, not {window}.")
    if max_tokens is not None and max_tokens < 1:
        raise SmoothQuantError(f"max_tokens must be at least 1, not {max_tokens}.")
    longest = window - max(front, 1)
    stride = longest if stride is None else stride
    if not 1 <= stride <= longest:
        raise SmoothQuantError(
            f"stride must be between 1 and {longest} for a window of {window} (a token needs one "
            f"before it), not {stride}."
        )
    ids = token_ids("\n\n".join(texts), tokenizer)[:max_tokens]
    done = 0 if front else 1
    if max_tokens is not None and max_tokens <= done:
        raise SmoothQuantError(f"max_tokens must be at least {done + 1}, not {max_tokens}.")
    if len(ids) <= done:
        raise SmoothQuantError(
            f"The text has {len(ids)} token{'s' * (len(ids) != 1)}, too few to score one: the first has nothing "
            "before it; give a longer text."
        )
    windows = []
    end = min(window - front, len(ids))
    while done < len(ids):
        start = max(0, end - (window - front))
        windows.append(Window(torch.tensor([prefix + ids[start:end]]), end - done))
        done, end = end, min(end + stride, len(ids))
    return windows


def check_vocabulary(config: Any, greatest: int) -> None:
    """Raises SmoothQuantError if token `greatest` exceeds the vocabulary of a model of that configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int) and greatest >= vocabulary:
        raise SmoothQuantError(
            f"The tokenizer makes token {greatest}, but a model has only {vocabulary} tokens: "
            "the tokenizer belongs to another model."
        )


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the text alone, without those that the tokenizer adds around it."""
    # verbose=False, because the warning that the text exceeds the model matters only if the model reads it whole.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer adds before a text: usually [bos] or none."""
    plain = token_ids("a", tokenizer)
    dressed = list(tokenizer("a")["input_ids"])
    # The search starts at the end: if "a" is unknown and the unknown token is BOS itself, the first match would be BOS.
    for front in reversed(range(len(dressed) - len(plain) + 1)):
        if dressed[front : front + len(plain)] == plain:
            return dressed[:front]
    return []
