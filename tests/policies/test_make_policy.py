"""`make_policy`: the table of engines."""

import importlib
import subprocess
import sys

import pytest
from tiny_models import contexts, tiny, worst_gap

from llm_gym.core import Sampling
from llm_gym.errors import SettingError
from llm_gym.policies import ENGINES, Policy, make_policy
from llm_gym.policies.builtin.policy import TransformersPolicy


def test_a_module_is_served_in_place():
    served = tiny()
    policy = make_policy(served, max_rows=3)
    assert isinstance(policy, TransformersPolicy)
    assert isinstance(policy, Policy)
    assert policy.model is served
    assert policy.max_rows == 3


def test_a_folder_is_loaded(tmp_path):
    served = tiny()
    served.save_pretrained(tmp_path)
    policy = make_policy(tmp_path, engine="transformers", device="cpu")
    start = contexts(4)
    done = policy.generate(start, Sampling(max_tokens=9), seeds=range(4))
    assert worst_gap(served, list(zip(start, done, strict=True))) < 2e-5


def test_none_is_the_embedded_model():
    policy = make_policy(device="cpu")
    assert sum(p.numel() for p in policy.model.parameters()) < 2e6
    assert policy.stop_ids


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"engine": "transformer"}, "did you mean 'transformers'"),
        ({"model": "no/such/folder", "engine": "transformers"}, "cannot load 'no/such/folder'"),
        ({"engine": "transformers", "max_row": 3}, "option of the transformers engine: .*did you mean 'max_rows'"),
        ({"max_context": 1 << 30}, "max_context: got 1073741824"),
    ],
)
def test_a_mistake_is_one_clear_sentence(arguments, said):
    with pytest.raises(SettingError, match=said):
        make_policy(**arguments)


@pytest.mark.parametrize("name", ENGINES)
def test_every_row_names_a_class(name):
    module, _, attribute = ENGINES[name].partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_importing_the_package_imports_no_engine():
    code = "import sys, llm_gym.policies, llm_gym.rollouts.driver; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
