"""What `import tiercache` costs and what it leaves alone."""

import subprocess
import sys

import tiercache as tc


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_loads_no_heavy_library():
    heavy = ["torch", "numpy", "pyarrow", "obstore", "fsspec", "pydantic", "typer", "rich", "sqlite3", "asyncio"]
    code = f"import sys, tiercache; print([m for m in {heavy} if m in sys.modules])"
    assert run_python("-W", "error", "-c", code).stdout.strip() == "[]"


def test_the_command_and_names_that_need_no_tensor_load_no_torch():
    code = """
import sys, tiercache, tiercache.cli.app
for name in ("Dataset", "Writer", "Cache", "Tensor", "pack"):
    getattr(tiercache, name)
print("torch" in sys.modules)
"""
    assert run_python("-c", code).stdout.strip() == "False"


def test_importing_starts_no_thread_and_opens_no_file_but_modules():
    code = """
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
before = set(os.listdir("/proc/self/fd"))
import tiercache
seen = list(opened)
after = set(os.listdir("/proc/self/fd"))
others = [p for p in seen if not p.endswith((".py", ".pyc")) and ".pyc." not in p]
print(len(os.listdir("/proc/self/task")), len(after - before), others)
"""
    assert run_python("-c", code).stdout.strip() == "1 0 []"


def test_without_torch_the_loader_names_the_extra():
    code = """
import sys
sys.modules["torch"] = sys.modules["torchdata"] = None
import tiercache
for name in ("DataLoader", "collate"):
    try:
        getattr(tiercache, name)
    except ImportError as error:
        print(error)
"""
    said = run_python("-c", code).stdout
    assert "tiercache.DataLoader needs torch" in said
    assert "tiercache.collate needs torch" in said
    assert said.count("pip install 'tiercache-data[torch]'") == 2


def test_reading_loads_nothing_that_only_filters_need(tmp_path):
    with tc.Writer(tmp_path, schema={"x": "int64"}) as writer:
        writer.write_batch({"x": list(range(100))})
    code = f"""
import sys, tiercache as tc
dataset = tc.Dataset({str(tmp_path)!r})
loader = tc.DataLoader(dataset, 10, shuffle=True)
assert [sum(len(batch["x"]) for batch in loader) for _ in range(3)] == [100, 100, 100]
dataset.close()
print([m for m in ["pandas", "pyarrow.dataset", "pyarrow.acero", "pyarrow.parquet"] if m in sys.modules])
"""
    assert run_python("-W", "error", "-c", code).stdout.strip() == "[]"
