"""The command line as a module, for launchers that start one: ``accelerate launch -m trio.cli eval ...``."""

from . import app

if __name__ == "__main__":
    app(prog_name="trio")
