"""One system on one case in a process of its own: `python -m benchmarks.speed.worker JSON`, which prints one as well.

So a system that needs more memory than there is ends alone, and its peak is its own.
"""

import json
import resource
import sys
import time
from typing import Any

from benchmarks.speed.cases import Case
from benchmarks.speed.systems import SYSTEMS


def run(case: Case, name: str, *, calls: int, budget: float) -> dict[str, Any]:
    """Times a system.

    Args:
        case: what is timed, with as many tasks as the system is to have.
        name: of the system.
        calls: timed calls, after a first one that compiles.
        budget: seconds after which it is called no more, but for one timed call.

    Returns:
        The seconds of each call, the losses of all meta-steps, how many meta-steps a call does, and the peak of the
        memory of this process in bytes.
    """
    step = SYSTEMS[name].start(case)
    spent: list[float] = []
    losses: list[float] = []
    for call in range(1 + calls):
        if call > 1 and sum(spent) > budget:
            break
        begin = time.perf_counter()
        values = step().tolist()
        spent.append(time.perf_counter() - begin)
        losses += values
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = kilobytes * (1 if sys.platform == "darwin" else 1024)
    return {"spent": spent, "losses": losses, "steps": len(values), "memory": peak}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(run(Case(**asked.pop("case")), asked.pop("name"), **asked)))
