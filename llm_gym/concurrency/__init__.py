"""Threads, event loops, what may be awaited, and retries."""

from llm_gym.concurrency.loops import Loop as Loop
from llm_gym.concurrency.loops import Stopped as Stopped
from llm_gym.concurrency.loops import at_once as at_once
from llm_gym.concurrency.loops import finish as finish
from llm_gym.concurrency.loops import is_async as is_async
from llm_gym.concurrency.loops import run_here as run_here
from llm_gym.concurrency.loops import wait as wait
from llm_gym.concurrency.retries import FIRST as FIRST
from llm_gym.concurrency.retries import LONGEST as LONGEST
from llm_gym.concurrency.retries import delay as delay
from llm_gym.concurrency.retries import tries as tries
from llm_gym.concurrency.threads import Outcome as Outcome
from llm_gym.concurrency.threads import Overdue as Overdue
from llm_gym.concurrency.threads import Runner as Runner
from llm_gym.concurrency.threads import Thread as Thread
from llm_gym.concurrency.threads import Worker as Worker
from llm_gym.concurrency.threads import cancelled as cancelled
from llm_gym.concurrency.threads import settled as settled
from llm_gym.concurrency.threads import within as within
