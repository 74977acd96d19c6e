"""`python -m tests.compatibility.write_table`: run every cell and write docs/compatibility.md."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.utils import logging

from tests.compatibility.table import PAGE, render


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
