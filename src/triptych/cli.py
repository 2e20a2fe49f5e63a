"""The command line: one table of commands. Heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from triptych import __version__
from triptych.core.errors import ConfigError, Problem, TriptychError

app = typer.Typer(
    name="triptych",
    help="Train vision-language models through every stage: pre-train, instruct, align.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

INTERRUPTED = 130
"""Exit status that typer turns Ctrl-C into."""

Recipe = Annotated[Path, typer.Argument(help="Recipe or pipeline file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.sub=value, merged into the recipe.", show_default=False, metavar="[K=V]..."),
]
Model = Annotated[Path, typer.Argument(help="Folder of a trained model.", show_default=False)]


def _quiet() -> None:
    """Keep what libraries say for developers off the terminal: bars for each file, hints at optional kernels."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What the package chose by itself is said too, in the way Python prints warnings where nothing else is set up.
    logging.getLogger("triptych").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Run a recipe or a pipeline; resumes by itself."""
    from triptych.engine.allocator import ENVIRONMENT

    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is loaded, which reads it then
    _quiet()
    from triptych.stages.pipeline import train as run

    run(recipe, overrides or [], dry_run=dry_run)


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show with their token weights.")] = 1,
) -> None:
    """Read every row and decode every picture; show token weights and what trains. Exit 1 on errors."""
    _quiet()
    from triptych.stages.checking import check as run

    if not run(recipe, overrides or [], samples=samples):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Folder of a trained model, or an evaluation file (YAML).", show_default=False)
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data file (not after an evaluation file), then key.sub=value.",
            show_default=False,
            metavar="[DATA] [K=V]...",
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image root; default: the folder of the data file.")] = None,
    format: Annotated[str, typer.Option(help="Format of the data file.")] = "llava",
    against: Annotated[Path | None, typer.Option(help="A second model, side by side.", show_default=False)] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Also with grey pictures: what guessing gets.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for a JSON line per answer and the summary.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
) -> None:
    """Answer the questions of data files and score the answers by task, one or more models side by side."""
    _quiet()
    from triptych.stages.evaluating import dataset_config, evaluation_file, run_evaluation, simple_evaluation

    first, *overrides = rest or [""]
    if model.suffix in (".yaml", ".yml"):
        given = {"--images": images, "--against": against, "--blind": blind, "--output": output, "--limit": limit}
        refused = [name for name, value in given.items() if value] + (["--format"] if format != "llava" else [])
        if refused:
            remedy = "set it in the file, or by its key: runs.0.limit=20 output=runs/again"
            raise typer.BadParameter(f"{', '.join(refused)} cannot be given with an evaluation file; {remedy}")
        recipe = evaluation_file(model, rest or [])
    elif not first or "=" in first:
        raise typer.BadParameter("give a data file after the folder of a model: triptych eval MODEL DATA")
    else:
        models = {"model": model} if against is None else {"model": model, "against": against}
        data = dataset_config(Path(first), images, format)
        recipe = simple_evaluation(data, models, overrides, blind=blind, output=output, limit=limit)
    run_evaluation(recipe)


@app.command()
def chat(
    model: Model,
    image: Annotated[
        str | None, typer.Option(help="Picture to start with: a path, or the number of a test scene.")
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
) -> None:
    """Talk with a model about pictures; `/image PATH` adds one, `/reset` starts over, `/exit` leaves."""
    _quiet()
    from triptych.stages.using import chat_in_terminal

    chat_in_terminal(model, image, system, max_new_tokens)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its `output`).", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, last, or the name of a checkpoint folder.")] = "best",
) -> None:
    """Merge adapters, save a Hugging Face folder, and verify it by reloading with plain transformers."""
    _quiet()
    from triptych.stages.exporting import export_run

    export_run(run, output, checkpoint)


@app.command()
def scenes(
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Training scenes.")] = 1000,
    test: Annotated[int, typer.Option(min=1, help="Test questions of each task.")] = 100,
    seed: Annotated[int, typer.Option(help="Scenes are a pure function of it.")] = 0,
) -> None:
    """Write the embedded data set: scenes of OpenMoji pictures, questions and captions in every file format."""
    from triptych.data.scene_files import Sizes, write_scenes

    console = Console(highlight=False, soft_wrap=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        bar = progress.add_task("drawing", total=None)
        is_new = write_scenes(
            output,
            Sizes(number, test, seed),
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if is_new:
        console.print(f"wrote {number} training scenes and {test} test questions a task to {output}")
    else:
        console.print(f"{output} holds exactly this already")


@app.command("report")
def write_report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a pipeline (its `output`).", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="HTML file to write; default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, accuracy by task, answers with pictures, what was trained."""
    from triptych.web.report import write_report as run_report

    console = Console(soft_wrap=True, markup=False, highlight=False)
    file, missing = run_report(run, output)
    console.print(f"report: {file}")
    if missing:
        console.print(f"pictures not found: {missing} (run this in the folder where the model was trained)")


@app.command()
def doctor() -> None:
    """Report on the environment: versions, devices, optional parts, what is known to conflict."""
    from triptych.stages.doctor import report

    if not report():
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        Console().print(__version__)
        raise typer.Exit()
    if _is_one_of_several() and context.invoked_subcommand != "train":
        # Each process would do all of it, and write the same files.
        message = f"`{context.invoked_subcommand}` runs in one process, and {os.environ['WORLD_SIZE']} were launched"
        raise ConfigError(Problem(message, remedy="run it without torchrun or `accelerate launch`"))


def main() -> None:
    """Entry point: errors meant for the user are printed without a traceback.

    Exit status: 0 all is well, 1 an error, 2 a wrong command line, 130 interrupted.
    """
    try:
        status = _run(Console(stderr=True, highlight=False, soft_wrap=True))
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        status = 1
    if _is_one_of_several() and "triptych.engine.parallel" in sys.modules:
        from triptych.engine.parallel import end_process

        end_process(status)
    sys.exit(status)


def _is_one_of_several() -> bool:
    """Whether a launcher started this process beside others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _run(errors: Console) -> int:
    """The exit status of the command, with its error printed."""
    try:
        app()
    except (TriptychError, OSError) as error:  # of the system: a full disk, a folder that may not be written
        errors.print(f"error: {error}", markup=False)
        return 1
    except SystemExit as end:
        if end.code == INTERRUPTED:
            errors.print("interrupted; the same command resumes a training run", markup=False)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
