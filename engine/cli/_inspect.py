"""engine inspect: what a checkpoint holds."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from engine._checkpoint_file import CheckpointFile, read_weight, weights_in
from engine._safetensors import CheckpointError
from engine.cli._output import one_line_errors, output_console, plain, plain_table, shape_text

FILES_NAMED = 3


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, any safetensors file, or a folder with one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds, after checking all of it. What is of a type unknown here is named at the end."""
    with one_line_errors():
        rows, checkpoint = _inspect(file)
    known = [row for row in rows if row["bytes"] is not None]
    totals = {key: sum(row[key] for row in known) for key in ("bytes", "dense_bytes")}
    if as_json:
        typer.echo(json.dumps({"file": str(file), "recipe": checkpoint.recipe, "tensors": rows, **totals}, indent=2))
        return
    console = output_console()
    table = plain_table("name", "format", "shape", "dtype", "sparsity", "bytes", "of dense", left=4)
    for row in rows:
        sparsity = "–" if row["sparsity"] is None else f"{row['sparsity']:.2f}"
        share = f"{row['bytes'] / row['dense_bytes']:.1%}" if row["dense_bytes"] else "–"
        table.add_row(
            plain(row["name"]),
            row["format"],
            shape_text(row["shape"]),
            row["dtype"],
            sparsity,
            "–" if row["bytes"] is None else f"{row['bytes']:,}",
            share,
        )
    console.print(table)
    for alias, name in checkpoint.aliases.items():
        console.print(plain(f"{alias} = {name}"))
    share = f"{totals['bytes'] / totals['dense_bytes']:.1%}" if totals["dense_bytes"] else "–"
    console.print(
        f"{len(known)} tensors, {len(checkpoint.weights)} compressed: {totals['bytes']:,} bytes, {share} of dense"
    )
    if unread := [f"{row['name']} ({row['dtype']})" for row in rows if row["bytes"] is None]:
        console.print(plain(f"not read, as their data type is not supported: {', '.join(unread)}"))
    if checkpoint.recipe is not None:
        console.print(f"recipe: {json.dumps(checkpoint.recipe)}")


def _inspect(path: Path) -> tuple[list[dict[str, Any]], CheckpointFile]:
    """A row for each weight and each other tensor; every one is read and checked, but for those of an unknown type."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:FILES_NAMED]) + (", ..." if len(found) > FILES_NAMED else "")
            raise CheckpointError(f"{path}: holds {len(found)} safetensors files: name one of {names}")
        path = found[0] if found else weights_in(path)
    file = CheckpointFile(path)
    rows: list[dict[str, Any]] = []
    for name, info in file.weights.items():
        format = read_weight(file, name)
        rows.append(
            {
                "name": name,
                "format": format.label,
                "shape": info.dense_shape(format),
                "dtype": str(info.dtype).removeprefix("torch."),
                "sparsity": format.sparsity,
                "bytes": format.nbytes,
                "dense_bytes": format.shape[0] * format.shape[1] * info.dtype.itemsize,
            }
        )
    for name in file.plain:
        entry, nbytes = file.entries[name], None
        if entry.dtype is not None:
            file.read(name)
            nbytes = entry.nbytes
        row = {"name": name, "format": "dense", "shape": entry.shape, "dtype": entry.type_name, "sparsity": None}
        rows.append({**row, "bytes": nbytes, "dense_bytes": nbytes})
    return sorted(rows, key=lambda row: row["name"]), file
