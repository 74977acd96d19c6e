"""`hf-attn recipe` lists the recipes, and says where they are when there are none."""

from __future__ import annotations

from typer.testing import CliRunner

from hf_attn.cli import recipe as command
from hf_attn.cli.app import app

run = CliRunner().invoke


def test_lists_every_recipe_with_its_summary():
    output = run(app, ["recipe"], env={"COLUMNS": "200"}).output
    folders = [path.parent for path in command.FOLDER.glob("*/train.py")]
    assert len(folders) >= 2
    for folder in folders:
        assert folder.name in output and (folder / "config.yaml").is_file()


def test_a_wheel_has_none_and_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    result = run(app, ["recipe", "moba_pretrain"], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "Clone the repository" in result.output


def test_arguments_and_exit_status_go_through(monkeypatch, tmp_path):
    script = tmp_path / "mine" / "train.py"
    script.parent.mkdir()
    script.write_text(f"import sys; open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:])); sys.exit(3)")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert run(app, ["recipe", "mine", "--smoke", "--output", "here"]).exit_code == 3
    assert (tmp_path / "seen").read_text() == "--smoke --output here"
