"""What all commands of the command line have in common."""

from __future__ import annotations

from typing import Any

import click

from tilus.errors import TilusError


class Command(click.Command):
    """A command that prints a TilusError without traceback, unless --traceback asks for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--traceback"], is_flag=True, help="Show where in tilus an error was raised."))

    def invoke(self, ctx: click.Context) -> Any:
        wants_traceback = ctx.params.pop("traceback")
        try:
            return super().invoke(ctx)
        except TilusError as error:
            if wants_traceback:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
