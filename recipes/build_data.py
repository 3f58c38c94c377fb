"""Build the text that ships with rheostat (src/rheostat/data) from a folder of source files.

    python recipes/build_data.py path/to/data

The folder holds text/novels_train.jsonl.gz, text/openstax_train.jsonl.gz, text/us_speeches.jsonl.gz,
text/wikitext2_raw_valid.txt.gz, prompts/bold.jsonl.gz, math/gsm8k_train.jsonl.gz, mc/arc_easy_train.jsonl.gz and
code/mbpp.jsonl.gz; sources and licences are in src/rheostat/data/README.md. Calibration and held-out text share no
document, and neither has any of the texts that our figures are measured on.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "src" / "rheostat" / "data"
CALIBRATION_CHARS = 1_500_000
HELD_OUT_CHARS = 150_000
SHARES = {"novels": 0.22, "textbooks": 0.2, "speeches": 0.08, "encyclopedia": 0.16, "wikitext": 0.22, "chat": 0.12}
PIECE = 6000
"""Characters in a document: long enough for a window of 1024 tokens, short enough for variety."""


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def bold(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Wikipedia sentences by what they are about: three quarters of the entities for reading, the rest for chat."""
    found: dict[str, dict[str, None]] = {}  # a dictionary for its order: sentences come more than once
    for row in rows(folder / "prompts/bold.jsonl.gz"):
        found.setdefault(row["entity"].replace("_", " "), {})[row["wikipedia"]] = None
    names = sorted(found)
    random.Random(2).shuffle(names)
    cut = len(names) // 4
    for_chat, for_reading = ({name: list(found[name]) for name in some} for some in (names[:cut], names[cut:]))
    return for_reading, for_chat


def sources(folder: Path) -> dict[str, list[str]]:
    """Whole documents of each kind, in a fixed order."""
    with gzip.open(folder / "text/wikitext2_raw_valid.txt.gz", "rt", encoding="utf-8") as stream:
        wikitext = stream.read()
    for_reading, _ = bold(folder)
    sentences = [sentence for about in for_reading.values() for sentence in about]
    random.Random(1).shuffle(sentences)
    return {
        "novels": [row["text"] for row in rows(folder / "text/novels_train.jsonl.gz")],
        "textbooks": [row["text"] for row in rows(folder / "text/openstax_train.jsonl.gz")],
        "speeches": [row["text"] for row in rows(folder / "text/us_speeches.jsonl.gz")],
        "encyclopedia": ["\n".join(sentences[i : i + 40]) for i in range(0, len(sentences), 40)],
        "wikitext": [wikitext[i : i + 60_000] for i in range(0, len(wikitext), 60_000)],
    }


def pieces(documents: list[str], chars: int, rng: random.Random) -> list[str]:
    """About `chars` characters in pieces cut at paragraph ends, every document giving a like share."""
    out: list[str] = []
    each = max(1, round(chars / PIECE / len(documents)))
    for document in documents:
        for _ in range(each):
            start = rng.randrange(max(1, len(document) - PIECE))
            start = document.find("\n", start) + 1 if start else 0
            out.append(document[start : start + PIECE].strip())
    rng.shuffle(out)
    total, kept = 0, []
    for piece in out:
        if total >= chars:
            break
        if len(piece) > 500:
            kept.append(piece)
            total += len(piece)
    return kept


def exchanges(folder: Path) -> list[list[tuple[str, str]]]:
    """Questions and answers, by kind: sums, school science, small programs, people and places."""
    sums = [
        (row["question"], re.sub(r"<<[^>]*>>", "", row["answer"]).replace("\n#### ", "\nThe answer is ") + ".")
        for row in rows(folder / "math/gsm8k_train.jsonl.gz")
    ]
    science = []
    for row in rows(folder / "mc/arc_easy_train.jsonl.gz"):
        choices = {c["label"]: c["text"] for c in row["question"]["choices"]}
        listed = "\n".join(f"{label}. {text}" for label, text in choices.items())
        right = row["answerKey"]
        science.append((f"{row['question']['stem']}\n{listed}", f"The answer is {right}: {choices[right]}."))
    programs = [
        (row["text"], "```python\n" + row["code"].replace("\r\n", "\n").replace("\t", "    ").strip() + "\n```")
        for row in rows(folder / "code/mbpp.jsonl.gz")
        if row["task_id"] >= 601  # the training split
    ]
    _, for_chat = bold(folder)
    about = [(f"Tell me about {who}.", " ".join(what[:6])) for who, what in for_chat.items()]
    return [sums, science, programs, about]


def conversations(folder: Path, chars: int, rng: random.Random) -> list[list[dict[str, str]]]:
    """About `chars` characters in conversations of one to three exchanges of one kind, the kinds in turn."""
    out: list[list[dict[str, str]]] = []
    kinds = exchanges(folder)
    for kind in kinds:
        rng.shuffle(kind)
    total = 0
    while total < chars:
        kind = kinds[len(out) % len(kinds)]
        turns = []
        for question, answer in [kind.pop() for _ in range(min(rng.randint(1, 3), len(kind)))]:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if turns:
            out.append(turns)
            total += sum(len(turn["content"]) for turn in turns)
        else:
            kinds.remove(kind)
    return out


Chosen = list[tuple[str, str | list[dict[str, str]]]]


def write(name: str, chosen: Chosen, rng: random.Random) -> None:
    rng.shuffle(chosen)
    lines = "".join(
        json.dumps({"source": s, "text" if isinstance(t, str) else "messages": t}, ensure_ascii=False) + "\n"
        for s, t in chosen
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / name).write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    print(name, len(chosen), "documents", len(lines), "characters", (OUT / name).stat().st_size, "bytes")


def main() -> None:
    rng = random.Random(0)
    folder = Path(sys.argv[1])
    calibration: Chosen = []
    held_out: Chosen = []
    for kind, documents in sources(folder).items():
        rng.shuffle(documents)
        cut = max(1, len(documents) // 8)
        held_out += [(kind, t) for t in pieces(documents[:cut], round(HELD_OUT_CHARS * SHARES[kind]), rng)]
        calibration += [(kind, t) for t in pieces(documents[cut:], round(CALIBRATION_CHARS * SHARES[kind]), rng)]
    talks = conversations(folder, round((CALIBRATION_CHARS + HELD_OUT_CHARS) * SHARES["chat"]), rng)
    cut = round(len(talks) * HELD_OUT_CHARS / (CALIBRATION_CHARS + HELD_OUT_CHARS))
    held_out += [("chat", t) for t in talks[:cut]]
    calibration += [("chat", t) for t in talks[cut:]]
    write("calibration.jsonl.gz", calibration, rng)
    write("heldout.jsonl.gz", held_out, rng)


if __name__ == "__main__":
    main()
