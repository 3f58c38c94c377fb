"""Model cards: the README.md of an artifact or of an exported checkpoint, with metadata that the Hub understands.

The last line of a card holds the digest of everything above it. A card whose digest fits is as we wrote it and may be
written again; any other is somebody's own, and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rheostat.errors import SettingError
from rheostat.report import tables, write_whole
from rheostat.report.markdown import code, escape, image, table
from rheostat.report.notes import measured, method_name, notes
from rheostat.report.pictures import pictures
from rheostat.report.schema import FILE, Report, read

NAME = "README.md"
MARK = re.compile(r"<!-- rheostat card ([0-9a-f]{64}): written anew by rheostat, until it is edited -->\n\Z")
MANIFEST = "rheostat.json"
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
TAGS = ("rheostat", "adaptive-compute", "dynamic-inference")


def artifact_card(manifest: Mapping[str, Any], *, name: str, report: Report | None = None, folder: str = "") -> str:
    """The card of an artifact.

    Args:
        manifest: what `rheostat.json` holds.
        name: the artifact's.
        report: what was measured of it, if anything was.
        folder: where the report and its pictures lie, below the artifact.
    """
    made = manifest["report"]
    base = made.get("base") or {}
    method = manifest["method"]["name"]
    parts = [f"# {escape(name)}", _what_it_is(manifest, base), "## How to load it", _loading(name, manifest)]
    parts += ["## The dial", _dial(manifest["dial"])]
    parts += ["## Measured quality", *_quality(report, folder, name)]
    parts += ["## How it was made", _made(manifest)]
    if made.get("provenance"):
        parts.append(table(tables.provenance(made["provenance"]), is_code=True))
    parts += ["## Limits", _limits(base)]
    data = metadata(base, library="rheostat", tags=(*TAGS, method))
    return signed(data, parts)


def export_card(facts: Mapping[str, Any], *, name: str) -> str:
    """The card of a plain checkpoint made by `export`.

    Args:
        facts: `base`, `method`, `asked`, `compute` (of the checkpoint itself), `ffn_size`, `dense_ffn_size` and
            `provenance`.
        name: the checkpoint's.
    """
    base = facts["base"]
    is_dense = facts["ffn_size"] == facts["dense_ffn_size"]
    width = (
        "All FFN channels are there: it is the dense model inside the adapted one."
        if is_dense
        else f"Every layer keeps {facts['ffn_size']} of {facts['dense_ffn_size']} FFN channels, for every token."
    )
    parts = [
        f"# {escape(name)}",
        f"A plain checkpoint{_from(base)}: one setting of the dial of a model adapted with Rheostat (method "
        f"{escape(facts['method'])}), frozen. {width} It costs {facts['compute']:.3f} of the dense model's FLOPs a "
        f"token; {facts['asked']:g} was the most it might cost. It needs no Rheostat and has no dial.",
        "## How to load it",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{code(name)}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{code(name)}")\n```',
        "## Limits",
        "- Its quality has not been measured. Expect less than the adapted model has at the same mean compute: it "
        "chooses a width for each token.\n" + _limits(base),
    ]
    if facts.get("provenance"):
        parts += ["## Provenance of the adapted model", table(tables.provenance(facts["provenance"]), is_code=True)]
    return signed(metadata(base, library="transformers", tags=("rheostat", *(() if is_dense else ("pruned",)))), parts)


EXAMPLE = 0.8
"""The `compute` shown in the example, where the dial reaches it."""
LOAD = """\
```python
import rheostat

model, tokenizer = rheostat.load("{name}")  # the folder; from the Hub, first huggingface_hub.snapshot_download(...)
batch = tokenizer(["Rivers are"], return_tensors="pt")
out = model.generate(**batch, max_new_tokens=64, compute={compute:g})
```

Stock `transformers` loads the same folder (and a copy of it on the Hub) as the dense model, without the dial."""


def metadata(base: Mapping[str, Any], *, library: str, tags: tuple[str, ...]) -> str:
    """The front matter: YAML between two lines of dashes."""
    from huggingface_hub import ModelCardData

    language = base.get("language")
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base.get("hub_id"),
        license=_licence(base),
        language=language if isinstance(language, str | list) else None,
        tags=list(dict.fromkeys(tags)),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _licence(base: Mapping[str, Any]) -> str | None:
    """The licence's short name, in the one spelling that the Hub takes; None for anything else."""
    name = str(base.get("license", "")).lower()
    return name if LICENCE.fullmatch(name) else None


def _from(base: Mapping[str, Any]) -> str:
    if base.get("hub_id"):
        return f" made from [{escape(base['hub_id'])}](https://huggingface.co/{base['hub_id']})"
    return f" made from {escape(str(base['name']))}" if base.get("name") else ""


def _what_it_is(manifest: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    low = manifest["dial"]["compute"][-1]
    reach = f"from {low:.3f} to 1" if low < 1 else "at 1 only: nothing was calibrated"
    return (
        f"A causal language model{_from(base)}, given a dial for its compute by Rheostat (method "
        f"{escape(manifest['method']['name'])}). The dial, `compute`, is the fraction of the dense model's FLOPs that "
        f"a token may cost, chosen for each request. It works {reach}; 1 is the dense model."
    )


def _loading(name: str, manifest: Mapping[str, Any]) -> str:
    compute = EXAMPLE if manifest["dial"]["compute"][-1] <= EXAMPLE else 1.0
    return LOAD.format(name=code(name).replace('"', "'"), compute=compute)


def _dial(dial: Mapping[str, Any]) -> str:
    found = tables.dial(dial)
    if found is None:
        return "None was calibrated: this model runs at compute 1 only."
    on = dial.get("measured_on") or {}
    size = f"Measured on {on['tokens']:,} tokens of held-out text. " if isinstance(on.get("tokens"), int) else ""
    return f"{size}Between the points the setting is interpolated.\n\n{table(found)}"


def _quality(report: Report | None, folder: str, name: str) -> list[str]:
    if report is None:
        command = f"rheostat eval {name} --out {name}/report"
        return [f"Not measured yet. `{code(command)}` measures it and fills in this section."]
    parts = []
    shown = {picture.name: picture for picture in pictures(report)}
    if "pareto" in shown:
        parts.append(image(shown["pareto"], f"{folder}/"))
    for text in report["texts"]:
        parts += [f"**{escape(text['name'])}**, {measured(text)}:"]
        parts.append(table(tables.quality(text, method_name(report))))
    if (scores := tables.tasks(report)) is not None:
        parts.append(table(scores))
    if (times := tables.bench(report)) is not None:
        parts.append(table(times))
    parts.append("\n".join(f"- {escape(line)}" for line in notes(report)))
    if measured_by := (report.get("provenance") or {}).get("command"):
        parts.append(f"Measured by `{code(str(measured_by))}`; everything is in [{FILE}]({folder}/{FILE}).")
    return parts


def _made(manifest: Mapping[str, Any]) -> str:
    made = manifest["report"]
    lines = []
    if isinstance(fit := made.get("fit"), Mapping):
        lines.append(f"- fitted in closed form on {fit['windows']} windows of {fit['length']} tokens")
    trained = (made.get("trained") or {}).get("tokens", 0)
    lines.append(f"- trained with gradients on {trained:,} tokens" if trained else "- not trained with gradients")
    if made.get("held_out"):
        lines.append(f"- dial measured on `{code(str(made['held_out']))}`")
    settings = {key: value for key, value in manifest["method"].items() if key != "name"}
    if settings:
        lines.append("- settings: " + ", ".join(f"`{code(f'{key}={value}')}`" for key, value in settings.items()))
    return "\n".join(lines)


def _limits(base: Mapping[str, Any]) -> str:
    lines = [
        "- Biases, errors and unsafe answers of the base model are in this one too; a cheaper setting makes mistakes "
        "more likely. It has not been checked for safety at any setting.",
        "- Quality at a setting depends on the text: figures hold for text like that which they were measured on.",
        "- FLOPs are not milliseconds: how much time a setting saves depends on the machine and on the batch.",
    ]
    if _licence(base) is None:
        lines.append(
            "- The licence of the base model is not known to this card. It holds for this model too: look it up."
        )
    return "\n".join(lines)


# -- the marker


def signed(front: str, parts: list[str]) -> str:
    """The card with its digest in the last line."""
    text = front + "\n" + "\n\n".join(parts) + "\n\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- rheostat card {digest}: written anew by rheostat, until it is edited -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as we wrote it."""
    found = MARK.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found.group(1)


def refresh(artifact: Path, folder: str) -> str | None:
    """Write the card of an artifact anew, with the report in its `folder`, unless somebody has edited or removed it.

    Returns:
        One line on what was done, or None where there is no card.

    Raises:
        SettingError: the card cannot be written.
    """
    file = artifact / NAME
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"model card: {file} cannot be read ({error}); left as it is"
    if not is_ours(text):
        return f"model card: {file} has been edited; left as it is"
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    try:
        report = read(artifact / folder / FILE)
    except SettingError:
        return None
    card = artifact_card(manifest, name=artifact.name, report=report, folder=folder)
    write_whole(file, card.encode())
    return f"model card: {file} now shows these figures"
