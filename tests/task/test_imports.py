"""The room stays light: no jax, and no torch even for prompts."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import r1re_jax.task


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_of_the_room_imports_jax_or_torch() -> None:
    names = [
        f"r1re_jax.task.{module.name}"
        for module in pkgutil.iter_modules(r1re_jax.task.__path__)
        if not module.ispkg
    ]
    assert "r1re_jax.task.prompts" in names
    _run(
        f"import sys, {', '.join(names)}\n"
        "found = {'jax', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not found, found"
    )


def test_prompts_need_no_torch(shared: Path) -> None:
    _run(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from transformers import AutoTokenizer\n"
        "from r1re_jax.task.prompts import PromptEncoder\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(shared / 'tokenizers' / 'qwen2_5')!r})\n"
        "encoder = PromptEncoder(tokenizer)\n"
        "assert encoder.decode(encoder.completion_tokens('so')) == 'so'\n"
    )
