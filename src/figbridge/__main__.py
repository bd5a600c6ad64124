"""``figbridge``, and ``python -m figbridge``: where every process begins.

Imports make some hundred thousand objects, and they stay. The collector would look through all of them several times
meanwhile, and once more at the end: a third of the CPU time of a short command. So it waits until they are there, and
then leaves them alone.
"""

import gc


def main() -> None:
    """Import the command line, and hand over to it."""
    gc.disable()
    from figbridge import cli, commands  # noqa: PLC0415 (not before the collector waits)

    gc.freeze()
    gc.enable()
    with commands.written():
        cli.main()


if __name__ == "__main__":
    main()
