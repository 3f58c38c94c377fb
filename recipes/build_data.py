"""Build the text that ships with rheostat (src/rheostat/data) from a folder of source files.

    python recipes/build_data.py path/to/data

The folder holds text/novels_train.jsonl.gz, text/openstax_train.jsonl.gz, text/us_speeches.jsonl.gz,
text/wikitext2_raw_valid.txt.gz and prompts/bold.jsonl.gz; sources and licences are in src/rheostat/data/README.md.
Calibration and held-out text share no document, and neither has any of the texts that our figures are measured on.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "src" / "rheostat" / "data"
CALIBRATION_CHARS = 1_500_000
HELD_OUT_CHARS = 150_000
SHARES = {"novels": 0.25, "textbooks": 0.25, "speeches": 0.1, "encyclopedia": 0.2, "wikitext": 0.2}
PIECE = 6000
"""Characters in a document: long enough for a window of 1024 tokens, short enough for variety."""


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def sources(folder: Path) -> dict[str, list[str]]:
    """Whole documents of each kind, in a fixed order."""
    with gzip.open(folder / "text/wikitext2_raw_valid.txt.gz", "rt", encoding="utf-8") as stream:
        wikitext = stream.read()
    sentences = (
        [s for row in rows(folder / "prompts/bold.jsonl.gz") for s in row["wikipedia"]]
        if isinstance(rows(folder / "prompts/bold.jsonl.gz")[0]["wikipedia"], list)
        else [row["wikipedia"] for row in rows(folder / "prompts/bold.jsonl.gz")]
    )
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


def write(name: str, chosen: list[tuple[str, str]], rng: random.Random) -> None:
    rng.shuffle(chosen)
    lines = "".join(json.dumps({"source": s, "text": t}, ensure_ascii=False) + "\n" for s, t in chosen)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / name).write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    print(name, len(chosen), "documents", len(lines), "characters", (OUT / name).stat().st_size, "bytes")


def main() -> None:
    rng = random.Random(0)
    calibration, held_out = [], []
    for kind, documents in sources(Path(sys.argv[1])).items():
        rng.shuffle(documents)
        cut = max(1, len(documents) // 8)
        held_out += [(kind, t) for t in pieces(documents[:cut], round(HELD_OUT_CHARS * SHARES[kind]), rng)]
        calibration += [(kind, t) for t in pieces(documents[cut:], round(CALIBRATION_CHARS * SHARES[kind]), rng)]
    write("calibration.jsonl.gz", calibration, rng)
    write("heldout.jsonl.gz", held_out, rng)


if __name__ == "__main__":
    main()
