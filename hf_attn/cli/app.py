"""The command table of `hf-attn`."""

from __future__ import annotations

import typer

from hf_attn.cli.bench import bench
from hf_attn.cli.build_cpu import build_cpu
from hf_attn.cli.build_kernels import build_kernels
from hf_attn.cli.calibrate import calibrate
from hf_attn.cli.convert import convert
from hf_attn.cli.demo import demo
from hf_attn.cli.doctor import doctor
from hf_attn.cli.hub import card, push
from hf_attn.cli.listing import list_command
from hf_attn.cli.recipe import recipe
from hf_attn.cli.tune import tune

app = typer.Typer(
    name="hf-attn",
    help="Published attention systems in the Hugging Face models you already have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.command("demo")(demo)
app.command("list")(list_command)
app.command("doctor")(doctor)
app.command("convert")(convert)
app.command("card")(card)
app.command("push")(push)
app.command("tune")(tune)
app.command("build-cpu")(build_cpu)
app.command("build-kernels")(build_kernels)
app.command("recipe", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(recipe)
app.add_typer(bench, name="bench")
app.add_typer(calibrate, name="calibrate")


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        import hf_attn

        typer.echo(hf_attn.__version__)
        raise typer.Exit
