"""What a call costs through Ray Serve, and which replica answers for which version (docs/cluster.md).

    python benchmarks/replicas.py localhost:50051 localhost:50052 models/atlas/versions/0 models/atlas/versions/1

asks a server and replicas of it the same question in turns, and then the replicas alone, version by version.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import grpc

from errata.v1 import common_pb2, inference_pb2, inference_pb2_grpc

QUESTION = "What is the capital of Kazakhstan?"
WARM = 10
KEY = "errata-replica"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("replicas")
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--n", type=int, default=150, help="calls in turns, and of each version")
    given = parser.parse_args()
    if given.n < 2:
        parser.error("--n is at least 2: one call has no quartiles")
    try:
        measure(given)
    except grpc.RpcError as error:
        parser.exit(1, f"{error.code().name}: {error.details()}\n")


def measure(given: argparse.Namespace) -> None:
    with grpc.insecure_channel(given.server) as plain, grpc.insecure_channel(given.replicas) as served:
        compare(plain, served, given.versions[0], given.n)
        spread(served, given.versions, given.n)


def compare(plain: grpc.Channel, served: grpc.Channel, version: str, n: int) -> None:
    """Milliseconds of a call: quartiles of each way, and of the differences of neighbours."""
    ways = [asker(plain, version), asker(served, version)]
    for _ in range(WARM):
        [ask() for ask in ways]
    times = [[_milliseconds(ask) for ask in ways] for _ in range(n)]
    for name, found in (
        ("server", [a for a, _ in times]),
        ("replicas", [b for _, b in times]),
        ("difference", [b - a for a, b in times]),
    ):
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:10} {middle:6.1f} ms ({low:.1f}-{high:.1f}), n = {n}")


def spread(served: grpc.Channel, versions: list[str], n: int) -> None:
    """How many of a version's calls each replica answered, one call after the other."""
    for version in versions:
        ask = asker(served, version)
        answered = Counter(str(dict(ask().trailing_metadata() or ())[KEY]) for _ in range(n))
        print(f"{version}: {', '.join(f'{replica} {count}' for replica, count in answered.most_common())}")


def asker(channel: grpc.Channel, version: str) -> Callable[[], grpc.Call]:
    generate = inference_pb2_grpc.InferenceServiceStub(channel).Generate
    request = inference_pb2.GenerateRequest(version=version, prompt=common_pb2.Prompt(text=QUESTION))
    return lambda: generate.with_call(request)[1]


def _milliseconds(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
