"""Every bad setting is one sentence on standard error, exit code 2, and nothing else: a table of command lines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llm_gym import embedded
from llm_gym.cli.group import llmgym

QA = "train --env Dataset-v0 --env-arg dataset={tmp}/qa.jsonl --env-arg prompt=question"

MINE = """
import gymnasium, torch
from llm_gym import Reply, TextEnv

def one_argument(only): return 0.0
def scalar(streams, config): return streams.logprobs.mean(), {}
def no_metrics(streams, config): return -streams.logprobs
def cut_metrics(streams, config): return -streams.logprobs, {"mine": streams.logprobs.mean()}
def raises(*args): raise KeyError("nothing")
def per_task(rewards): return rewards.returns[:, 0]
def one_weight(counts, length): return 1.0
def one_ratio(ratio, low, high): return ratio.mean()
def one_kl(logprobs, ref): return (logprobs - ref).mean()
def many(group, limit): return group.rewards
def nothing(*args): return None
def exits(*args): raise SystemExit
class Mute(Exception):
    def __str__(self): raise RuntimeError
def mute(*args): raise Mute
number = 5
def arrays(streams, config): return -streams.logprobs.detach().numpy(), {}
def numbered(streams, config): return -streams.logprobs, {1: streams.logprobs.detach()}
def ragged(rewards): return [[1.0], [2.0, 3.0]]
def infinite(counts, length): return counts / 0.0
def word(group, limit): return "no"
def far(rows, seed, config): return Far()
def few(rows, seed, config): return Few()
def sets(rows, seed, config): return Sets()
class Far:
    def draw(self, count, avoid=()): return [10 ** 6] * count
    def learn(self, row, passed, failed): pass
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
class Few(Far):
    def draw(self, count, avoid=()): return [0]
class Sets(Far):
    def draw(self, count, avoid=()): return [0] * count
    def state_dict(self): return {"seen": {1}}
class Long(TextEnv):
    def open(self): return [{"role": "user", "content": "word " * 400}]
    def reply(self, text): return Reply(reward=1.0, done=True)
class Broken(Long):
    def open(self): return self.nothing
gymnasium.register("me/Long-v0", Long)
gymnasium.register("me/Broken-v0", Broken)
def claims(streams, config): return -streams.logprobs, {}
claims.by_advantage = True
"""

BAD = {
    "an environment": ("train --env Arithmetc-v0", ("env", "'Arithmetc-v0'", "'Arithmetic-v0'")),
    "an environment's module": ("train --env no_such_module:me/X-v0", ("env", "'no_such_module'")),
    "an environment without its module": ("envs me/Hangman-v0", ("env", "'me/Hangman-v0'", "module:me/Hangman-v0")),
    "an environment without text": ("train --env CartPole-v1", ("env", "CartPole-v1", "token ids")),
    "one environment twice": ("train --env Arithmetic-v0 --env Arithmetic-v0", ("envs", "Arithmetic-v0", "name: ")),
    "an environment argument": ("train --env-arg digit_max=3", ("'digit_max'", "'digits_max'")),
    "an argument's type": ("train --env-arg digits_max=x", ("digits_max", "'x'", "whole number", "Arithmetic-v0")),
    "an argument's value": ("train --env-arg split=tset", ("split", "'tset'", "'test'")),
    "an argument's form": ("train --env-arg digits_max", ("--env-arg", "'digits_max'", "key=value")),
    "a missing argument": ("train --env Dataset-v0", ("needs dataset", "--env-arg dataset=")),
    "a data set": ("train --env GSM8K-v0 --env-arg dataset={tmp}/qb.jsonl", ("dataset", "qb.jsonl", "qa.jsonl")),
    "a column": (QA.replace("question", "questin") + " --env-arg reward=math:sqrt", ("'questin'", "prompt=question")),
    "a column of another name": (
        "train --env Dataset-v0 --env-arg dataset={tmp}/qa.jsonl",
        ("'prompt'", "question, answer", "prompt=question"),
    ),
    "a context": ("train --env-arg max_context=10", ("max_context", "10", "Arithmetic-v0")),
    "a context for long prompts": ("train --env mine:me/Long-v0 --env-arg max_context=300", ("max_context", "300")),
    "a first message": ("train --env mine:me/Broken-v0", ("me/Broken-v0", "AttributeError", "mine.py", "line 43")),
    "a reward's module": (QA + " --env-arg reward=no_such_module:f", ("reward", "'no_such_module:f'")),
    "a module with words of its own": (QA + " --env-arg reward=words:f", ("reward", "words of its own!")),
    "a reward's function": (QA + " --env-arg reward=math:sqr", ("reward", "'sqr'", "'sqrt'")),
    "no reward": (QA + " --env-arg reward={{}}", ("reward", "at least one")),
    "a reward's arguments": (QA + " --env-arg reward=mine:one_argument", ("'one_argument'", "row 0", "mine.py", "5")),
    "a reward that raises": (QA + " --env-arg reward=mine:raises", ("'raises'", "KeyError", "mine.py", "9", "row 0")),
    "a reward that gives nothing": (QA + " --env-arg reward=mine:nothing", ("'nothing'", "None", "mine.py", "row 0")),
    "a model": ("train --model {tmp}/model", ("{tmp}/model", "no such folder")),
    "a model's name": ("train --model nosuch", ("model", "'nosuch'")),
    "a model's name for chats": ("sft --data {tmp}/chats.jsonl --model nosuch", ("model", "'nosuch'")),
    "weights of rewards": ("train --env-arg reward_weights=3", ("reward_weights", "got 3", "by name")),
    "more threads than can be": ("train --set threads=1000000", ("threads", "1000000", "[1, 1024]")),
    "an id that ends a reply": ("train --set sampling.stop_token_ids=[-1]", ("sampling.stop_token_ids", "-1", ">= 0")),
    "data of another kind": ("sft --data {tmp}/mine.py", ("dataset", "mine.py", ".jsonl")),
    "a teacher's name": ("distill --teacher nosuch", ("distill.teacher: 'nosuch'", "hub id")),
    "a key": ("train --set stepz=3", ("'stepz'", "'steps'")),
    "a nested key": ("train --set loss.clip_hig=0.3", ("'loss.clip_hig'", "'loss.clip_high'")),
    "a value": ("train --set steps=many", ("steps", "'many'", "whole number")),
    "a range": ("train --steps 0", ("steps", "got 0")),
    "an assignment": ("train --set steps", ("--set", "'steps'")),
    "a preset": ("train --preset dapoo", ("preset", "'dapoo'", "'dapo'")),
    "a name": ("train --set advantage=grupo", ("advantage", "'grupo'", "'group_norm'")),
    "a normaliser": ("train --set loss.normaliser=nope", ("loss.normaliser", "'nope'", "token_global")),
    "one episode a group": ("train --set group_size=1", ("group_size", "1", "'group_norm'", "none")),
    "a negative seed": ("train --seed -1", ("seed", "-1")),
    "a huge seed": ("train --seed 99999999999999999999", ("seed", "99999999999999999999")),
    "no threads": ("train --set threads=0", ("threads", "got 0", "[1, 1024]")),
    "no rows": ("train --set policy.max_rows=0", ("policy.max_rows", "got 0", "at least 1")),
    "a canary's limit": ("train --set policy.canary_limit=-1", ("policy.canary_limit", "-1.0")),
    "episodes of evaluation": ("train --set eval.episodes=-1", ("eval.episodes", "got -1", "at least 0")),
    "checkpoints to keep": ("train --set checkpoint.keep=-1", ("checkpoint.keep", "got -1", "at least 0")),
    "no time": ("train --set time_limit=0", ("time_limit", "0.0", "> 0")),
    "negative time": ("train --set time_limit=-1", ("time_limit", "-1.0", "> 0")),
    "time that is no number": ("train --set time_limit=.nan", ("time_limit", "nan", "> 0")),
    "a rate without end": ("train --set optimizer.lr=.inf", ("optimizer.lr", "inf", "finite")),
    "a floor above the peak": ("train --set optimizer.floor=2", ("optimizer.floor", "2.0", "[0, 1]")),
    "a decay rate": ("train --set optimizer.betas=[2,.9]", ("optimizer.betas", "(2.0, 0.9)", "[0, 1)")),
    "a negative eps": ("train --set optimizer.eps=-1", ("optimizer.eps", "-1.0", "at least 0")),
    "a token budget": ("train --set token_budget=lots", ("token_budget", "'lots'", "whole number or auto")),
    "an optimizer": ("train --set optimizer.name=adam", ("optimizer.name", "'adam'", "'adamw'")),
    "a device": ("train --set device=gpu", ("device", "'gpu'", "cuda")),
    "a device that is not here": ("train --set device=cuda:99", ("device", "'cuda:99'", "here")),
    "a device for chats": ("sft --data {tmp}/chats.jsonl --set device=cuda:99", ("device", "'cuda:99'", "here")),
    "adapters": ("train --set lora=3", ("lora", "got 3", "mapping")),
    "a layer to adapt": ("train --set lora.target_modules=nope", ("lora.target_modules", "'nope'")),
    "one layer of two": ("train --set lora.target_modules=[q_proj,nope]", ("lora.target_modules", "'nope'")),
    "a pattern of layers": ("train --set lora.target_modules=(q_proj", ("lora.target_modules", "'(q_proj'", "pattern")),
    "modules to save": ("train --set lora.modules_to_save=[nope]", ("lora.modules_to_save", "'nope'")),
    "a layer's number": ("train --set lora.layers=9", ("lora.layers", "'9'", "0 to 3")),
    "a layer to train": ("train --set memory.train_layers=-9", ("memory.train_layers", "'-9'", "0 to 3")),
    "an engine to train with": ("train --policy vlm", ("policy.engine", "'vlm'", "'vllm'")),
    "a text-only engine": ("train --policy openai", ("policy.engine", "'openai'", "new weights")),
    "another engine's arguments": ("train --set policy.vllm={{x:1}}", ("policy.vllm", "'x:1'", "'transformers'")),
    "no server's arguments": (
        "train --set policy.server={{folder:x}}",
        ("policy.server", "'folder:x'", "'transformers'"),
    ),
    "a synchronisation": ("train --set policy.sync=shard", ("policy.sync", "'shard'", "'shared'")),
    "an engine's synchronisation": ("train --policy vllm --set policy.sync=file", ("'file'", "'vllm'", "tensors")),
    "a sampling": ("train --set sampling.top_p=2", ("sampling.top_p", "2.0")),
    "a temperature that is no number": ("train --set sampling.temperature=.nan", ("sampling.temperature", "nan")),
    "a loss's arguments": ("train --set loss.name=mine:one_argument", ("loss.name", "mine.py", "line 5", "TypeError")),
    "a loss of another shape": ("train --set loss.name=mine:scalar", ("loss.name", "mine.py", "line 6", "()", "[M]")),
    "a loss without metrics": ("train --set loss.name=mine:no_metrics", ("loss.name", "mine.py", "line 7", "metrics")),
    "a loss's metric": ("train --set loss.name=mine:cut_metrics", ("loss.name", "mine.py", "'mine'", "()", "[M]")),
    "a loss that raises": ("train --set loss.name=mine:raises", ("loss.name", "KeyError", "mine.py", "line 9")),
    "an advantage's arguments": ("train --set advantage=mine:many", ("advantage", "mine.py", "line 14", "TypeError")),
    "an advantage of another shape": (
        "train --set advantage=mine:per_task",
        ("advantage", "mine.py", "(2,)", "[P, G]"),
    ),
    "a filter's arguments": ("train --set filters.mine:one_argument=1", ("filters", "mine.py", "line 5", "TypeError")),
    "a filter that gives many": ("train --set filters.mine:many=1", ("filters", "mine.py", "line 14", "true or false")),
    "a normaliser of another shape": (
        "train --set loss.normaliser=mine:one_weight",
        ("loss.normaliser", "mine.py", "line 11", "[E]"),
    ),
    "a correction of another shape": (
        "train --set loss.correction.name=mine:one_ratio",
        ("loss.correction.name", "mine.py", "line 12", "[M]"),
    ),
    "a kl of another shape": (
        "train --set loss.kl=mine:one_kl --set loss.kl_weight=.1",
        ("loss.kl", "mine.py", "line 13", "[M]"),
    ),
    "a curriculum's arguments": (
        QA.replace("question", "question --set curriculum.name=mine:one_argument"),
        ("curriculum.name", "mine.py", "line 5", "TypeError"),
    ),
    "a curriculum beyond the data": (
        QA.replace("question", "question --set curriculum.name=mine:far"),
        ("curriculum.name", "mine.py", "1000000", "row"),
    ),
    "a curriculum that draws too few": (
        QA.replace("question", "question --set curriculum.name=mine:few"),
        ("curriculum.name", "mine.py", "line 35", "[0]", "2 rows"),
    ),
    "a curriculum's state": (
        QA.replace("question", "question --set curriculum.name=mine:sets"),
        ("curriculum.name", "mine.py", "TypeError", "set", "JSON"),
    ),
    "a loss that exits": ("train --set loss.name=mine:exits", ("loss.name", "mine.py", "SystemExit")),
    "a loss whose error has no words": ("train --set loss.name=mine:mute", ("loss.name", "mine.py", "raised Mute;")),
    "a loss that is no function": ("train --set loss.name=mine:number", ("loss.name", "'mine:number'", "5")),
    "a loss that claims too much": ("train --set loss.name=mine:claims", ("loss.name", "mine.py", "`by_advantage`")),
    "a loss that is nowhere": ("train --set loss.name=mine:scalars", ("loss.name", "'scalars'", "'scalar'")),
    "a loss of numpy": ("train --set loss.name=mine:arrays", ("loss.name", "mine.py", "ndarray", "Tensor")),
    "a metric without a name": ("train --set loss.name=mine:numbered", ("loss.name", "mine.py", "called 1")),
    "an advantage of many lengths": (
        "train --set advantage=mine:ragged",
        ("advantage", "mine.py", "line 23", "[P, G]"),
    ),
    "a weight without end": ("train --set loss.normaliser=mine:infinite", ("loss.normaliser", "mine.py", "inf")),
    "a filter that gives a word": ("train --set filters.mine:word=1", ("filters", "mine.py", "'no'", "true or false")),
    "a reward that exits": (QA + " --env-arg reward=mine:exits", ("'exits'", "SystemExit", "mine.py", "row 0")),
    "a reward whose error has no words": (QA + " --env-arg reward=mine:mute", ("'mute'", "raised Mute at", "mine.py")),
    "a module that exits": (QA + " --env-arg reward=leaves:f", ("reward", "'leaves'", "SystemExit: 0")),
    "an environment's module that is no Python": ("train --env wrong:me/X-v0", ("env", "'wrong'", "SyntaxError")),
    "a loss's module that fails": ("train --set loss.name=leaves:f", ("loss.name", "'leaves'", "SystemExit: 0")),
    "a configuration file": ("train --config {tmp}/none.yaml", ("none.yaml", "No such file")),
    "broken YAML": ("train --config {tmp}/bad.yaml", ("bad.yaml", "not YAML")),
    "a used folder": ("train --out {tmp}/used", ("used", "--resume")),
    "a file as folder": ("train --out {tmp}/qa.jsonl", ("out", "qa.jsonl", "is a file")),
    "a file as folder for chats": (
        "sft --data {tmp}/chats.jsonl --out {tmp}/qa.jsonl",
        ("out", "qa.jsonl", "is a file"),
    ),
    "nothing to resume": ("train --resume", ("--resume", "--out")),
    "no teacher": ("distill", ("distill.teacher", "--teacher")),
    "a teacher's tokens": (
        "distill --teacher {tmp}/used --kl top_k --set distill.top_k=100000",
        ("distill.teacher", "used", "no checkpoint"),
    ),
    "more tokens than there are": (
        "distill --teacher {tmp}/nan --kl top_k --set distill.top_k=100000",
        ("distill.top_k", "100000", "576"),
    ),
    "an advantage for a teacher": ("distill --teacher {tmp}/nan --set advantage=rloo", ("advantage", "'rloo'")),
    "a stage after a good one": ("run {tmp}/plan.yaml", ("2-train", "loss.name", "mine.py", "line 6")),
    "a stage's layers": ("run {tmp}/layers.yaml", ("2-train", "lora.target_modules", "'nope'")),
    "an environment to measure": ("eval --env GSM8k-v0", ("'GSM8k-v0'", "'GSM8K-v0'")),
    "a model to measure": ("eval --model {tmp}/model", ("{tmp}/model", "no such folder")),
    "a model's name to measure": ("eval --model nosuch", ("model", "'nosuch'")),
    "a reward to measure": (
        QA.replace("train", "eval") + " --env-arg reward=mine:raises",
        ("'raises'", "mine.py", "row 0"),
    ),
    "an engine": ("eval --engine vlm", ("engine", "'vlm'", "'vllm'")),
    "an engine's option": ("eval --engine server --option server=http://x", ("'server'", "'servers'")),
    "an option's form": ("eval --engine server --option servers", ("--option", "'servers'", "key=value")),
    "no server": ("eval --engine server", ("servers", "llmgym serve")),
    "a server": ("eval --engine server --option servers=http://127.0.0.1:1 --option start_seconds=0", ("127.0.0.1:1",)),
    "an endpoint": (
        "eval --engine openai --model m --option base_url=http://127.0.0.1:1/v1 --option start_seconds=0",
        ("base_url", "127.0.0.1:1", "start_seconds"),
    ),
    "an endpoint's model": ("eval --engine openai", ("model",)),
    "an argument of vLLM's": ("serve --set max_model_len", ("--set", "'max_model_len'", "max_model_len=4096")),
    "too many episodes": ("eval --env GSM8K-v0 --env-arg dataset=sample --episodes 99", ("--episodes", "99", "12")),
    "two ways to sample": ("eval --greedy --temperature 0.5", ("--temperature", "--greedy")),
    "a temperature": ("eval --temperature -1", ("temperature", "-1.0")),
    "an unfinished run": ("eval --model {tmp}/used", ("used", "checkpoint")),
    "no chats": ("sft", ("data",)),
    "chats": ("sft --data {tmp}/none.jsonl", ("none.jsonl",)),
    "a number of steps for chats": ("sft --data {tmp}/chats.jsonl --steps 0", ("steps", "got 0", "at least 1")),
    "a type to save": ("sft --data {tmp}/chats.jsonl --set save_dtype=int4", ("save_dtype", "'int4'", "float16")),
    "a layer to adapt to chats": (
        "sft --data {tmp}/chats.jsonl --set lora.target_modules=[nope]",
        ("lora.target_modules", "'nope'"),
    ),
    "a run": ("view {tmp}/nowhere", ("nowhere", "does not exist")),
    "a file as a run": ("view {tmp}/qa.jsonl", ("qa.jsonl", "is a file")),
    "no run to replay": ("replay {tmp}/nowhere --step 1", ("run", "nowhere", "does not exist")),
    "a file as a folder to replay into": (
        "replay {tmp}/played --step 1 --out {tmp}/qa.jsonl",
        ("out", "qa.jsonl", "File exists"),
    ),
    "an environment to describe": ("envs Guess-v0", ("'Guess-v0'", "'GuessNumber-v0'")),
    "an environment without text to describe": ("envs CartPole-v1", ("env", "CartPole-v1", "token ids")),
    "an argument to describe": ("envs Arithmetic-v0 --env-arg digit_max=3", ("'digit_max'", "'digits_max'")),
    "an argument of nothing": ("envs --env-arg digits_max=3", ("--env-arg", "'digits_max=3'", "ID")),
    "a setting given twice": ("train --config {tmp}/twice.yaml", ("twice.yaml", "'steps'", "twice", "line 1")),
    "a stage's setting given twice": ("run {tmp}/twice_staged.yaml", ("twice_staged.yaml", "'seed'", "twice")),
    "a beginning of a name": ("train --set loss.name=ppo", ("loss.name", "'ppo'", "'ppo_clip'")),
    "a template's file": ("train --chat-template none.jinja", ("chat_template", "no file", "'none.jinja'")),
    "a folder by its slash": ("train --model nothing/", ("model", "'nothing/'", "no such folder")),
    "a time to evaluate": ("train --eval-every -1", ("eval.every", "got -1", "at least 0")),
    "a time to evaluate chats": ("sft --data {tmp}/chats.jsonl --set eval.every=-1", ("eval.every", "got -1")),
    "a time to save": ("train --set checkpoint.every=-1", ("checkpoint.every", "got -1", "at least 0")),
    "a best without measure": (
        "train --set checkpoint.keep_best=true --set eval.episodes=0",
        ("checkpoint.keep_best", "eval.episodes=0"),
    ),
    "a token that is none": (
        "train --set sampling.stop_token_ids=[3,99999]",
        ("sampling.stop_token_ids", "99999", "576"),
    ),
    "addresses for another engine": (
        "train --policy vllm --set policy.servers=[http://127.0.0.1:1]",
        ("policy.servers", "'vllm'", "only 'server'"),
    ),
    "a server by its address alone": ("eval --option servers=127.0.0.1:1", ("servers", "'http://127.0.0.1:8000'")),
    "a teacher's folder": ("distill --teacher {tmp}/empty", ("distill.teacher", "empty", "config.json")),
    "a teacher's address": ("distill --teacher http://", ("distill.teacher", "want a URL such as")),
    "a logger twice": ("train --set log.to=[tensorboard,tensorboard]", ("log.to", "'tensorboard'", "twice")),
    "an option's range": ("eval --option max_rows=0", ("max_rows", "got 0", "at least 1")),
    "an option's type": ("eval --option max_context=x", ("max_context", "'x'", "whole number")),
    "a model to serve": ("serve --model {tmp}/empty", ("model", "empty", "config.json")),
}

LATE = {
    "a cut file of weights": ("train --model {tmp}/cut --out {tmp}/new", ("model", "cut", "cannot be loaded")),
    "weights that are no numbers": (
        "train --model {tmp}/nan --out {tmp}/new",
        ("model", "nan", "embed_tokens", "not finite"),
    ),
    "a cut file to measure": ("eval --model {tmp}/cut", ("model", "cut")),
    "a cut file for chats": ("sft --data {tmp}/chats.jsonl --model {tmp}/cut --out {tmp}/new", ("model", "cut")),
}
"""What only the weights can show."""


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good and bad things in it, which is the current one."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "mine.py").write_text(MINE)
    (tmp / "leaves.py").write_text("raise SystemExit(0)")
    (tmp / "wrong.py").write_text("def f(:")
    (tmp / "words.py").write_text("raise ImportError('words of its own!')")
    (tmp / "qa.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    chat = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    (tmp / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp / "bad.yaml").write_text("a: [")
    for name, second in {"plan": "loss: {name: mine:scalar}", "layers": "lora: {target_modules: [nope]}"}.items():
        (tmp / f"{name}.yaml").write_text(f"stages:\n- sft: {{dataset: chats.jsonl}}\n- train: {{{second}}}\n")
    (tmp / "twice.yaml").write_text("steps: 3\nsteps: 4\n")
    (tmp / "twice_staged.yaml").write_text("stages:\n- train: {seed: 1, steps: 2, seed: 3}\n")
    (tmp / "empty").mkdir()
    (tmp / "played" / "episodes").mkdir(parents=True)
    (tmp / "played" / "config.yaml").write_text("steps: 3\n")
    (tmp / "played" / "episodes" / "step_000001.jsonl").write_text("")
    (tmp / "used").mkdir()
    (tmp / "used" / "config.yaml").write_text("steps: 3\n")
    (tmp / "used" / "metrics.jsonl").write_text("")
    for name in ("cut", "nan"):
        shutil.copytree(embedded.PATH, tmp / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    whole = tmp / "cut" / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:1_000_000])
    weights = load_file(tmp / "nan" / "model.safetensors")
    weights[min(weights)].view(-1)[7] = torch.nan
    save_file(weights, tmp / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp)
        here.syspath_prepend(str(tmp))
        here.setattr("sys.dont_write_bytecode", True)
        yield tmp


@pytest.mark.parametrize(("line", "words"), BAD.values(), ids=BAD)
def test_one_sentence(tmp: Path, line: str, words: tuple[str, ...]) -> None:
    before = sorted(tmp.rglob("*"))
    done = CliRunner().invoke(llmgym, line.format(tmp=tmp).split())
    assert done.stderr.startswith("Error: "), (done.stderr, done.exception)
    assert done.stderr.count("\n") == 1
    assert re.search(r"[^.?!][.?!]\n$", done.stderr), "it has one end"
    assert not re.search(r"[.?]; ", done.stderr), "and not before it"
    for word in words:
        assert word.format(tmp=tmp) in done.stderr
    assert (done.exit_code, done.stdout) == (2, "")
    assert sorted(tmp.rglob("*")) == before, "a refused run leaves nothing behind"


@pytest.mark.parametrize(("line", "words"), LATE.values(), ids=LATE)
def test_one_sentence_of_what_only_the_weights_show(tmp: Path, line: str, words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(llmgym, line.format(tmp=tmp).split())
    shutil.rmtree(tmp / "new", ignore_errors=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: "), (done.stderr, done.exception)
    for word in words:
        assert word.format(tmp=tmp) in last
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("line", "near"), [("trian", "train"), ("train --stepss 3", "--steps"), ("config sftt", "sft"), ("view", "RUN")]
)
def test_what_click_refuses_names_the_way_out(line: str, near: str) -> None:
    done = CliRunner().invoke(llmgym, line.split())
    assert done.exit_code == 2
    assert near in done.stderr
    assert done.stdout == ""


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMGYM_DEBUG", "1")
    done = CliRunner().invoke(llmgym, ["envs", "Guess-v0"])
    assert "Guess-v0" in str(done.exception)
    assert done.exc_info is not None
    assert done.exc_info[0].__name__ == "SettingError"


def test_an_evaluation_without_a_sound_episode_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alwaysbroken.py").write_text(
        "import gymnasium, llm_gym\n"
        "class Broken(llm_gym.TextEnv):\n"
        "    def open(self):\n"
        "        return [{'role': 'user', 'content': '1+1?'}]\n"
        "    def reply(self, text):\n"
        "        raise RuntimeError('no database')\n"
        "gymnasium.register('broken/All-v0', entry_point=Broken)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["eval", "--env", "alwaysbroken:broken/All-v0", "--episodes", "3", "--out", str(tmp_path / "said.json")]
    done = CliRunner().invoke(llmgym, words)
    assert done.exit_code == 2
    assert "each of the 3 episodes failed: RuntimeError: no database" in done.stderr
    assert "env_error 3" in done.stdout
    assert (tmp_path / "said.json").exists()
