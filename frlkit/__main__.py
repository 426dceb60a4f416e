"""``frlkit``, or ``python -m frlkit``: the kit's command line."""

from __future__ import annotations

import click

from frlkit import __version__
from frlkit.commands import networks, studies
from frlkit.commands.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors; may stand behind a command, too.")
def main(quiet: bool) -> None:
    """Class-wise adversarial robustness and Fair Robust Learning: a reproduction kit.

    Data are found under the folder that FRLKIT_DATA names (default: data/ in the project); torchvision downloads
    what is missing. Radii and step sizes are in 1/255. For completion in bash:
    eval "$(_FRLKIT_COMPLETE=bash_source frlkit)", and alike for zsh and fish.
    """


for command in (*studies.COMMANDS, *networks.COMMANDS):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m frlkit")
