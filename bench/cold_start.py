"""The whole HTTP request that finds its function in no sandbox, against starting Python.

    python -m bench.cold_start [ROUNDS]

Every round times, one after the other: `python -I -S -c pass`, the same in bwrap, a cold request to
a small function with a generic sandbox ready, one to a function with numpy and pandas preloaded,
and one with no sandbox ready at all (a pool miss, on a second server that keeps none).
"""

import sys
import time

from bench import harness

HEAVY = """
import numpy, pandas

def handler(event, context):
    return {"statusCode": 200, "body": str(int(pandas.Series(numpy.arange(4)).sum()))}
"""
REQUIREMENTS = "numpy==2.4.6\npandas==3.0.3\n"
HEAVY_IMPORT = "import sys; sys.path.append(sys.argv[1]); import numpy, pandas"


def main(rounds: int) -> None:
    """Measure and report."""
    report = harness.Report("cold_start")
    times: dict[str, list[float]] = {}
    with (
        harness.server("--generic-min", "4") as warm,
        harness.server("--generic-min", "0", "--generic-max", "0") as empty,
    ):
        package = warm.upload(harness.HELLO)
        heavy_package = warm.upload(HEAVY)
        libraries = _build_heavy(warm)
        missing_package = empty.upload(harness.HELLO)
        for number in range(rounds):
            for which in (warm, empty):
                which.deploy(
                    f"small{number}", package if which is warm else missing_package, **COLD
                )
            warm.deploy(f"heavy{number}", heavy_package, environment="heavy", **COLD)
        for number in range(rounds):
            warm.wait_generic(5)
            time.sleep(0.05)
            times.setdefault("python", []).append(harness.start_python())
            times.setdefault("bwrap python", []).append(harness.start_bwrap_python())
            for label, server, name, start in (
                # first, because what the others took is being refilled afterwards
                ("pool miss", empty, "small", "forked"),
                ("cold, small", warm, "small", "generic"),
                ("cold, numpy + pandas", warm, "heavy", "generic"),
            ):
                took_s, response = server.call(f"{name}{number}")
                if response.headers["Dayfly-Start"] != start:
                    raise RuntimeError(f"{label}: {response.headers['Dayfly-Start']}, not {start}")
                times.setdefault(label, []).append(took_s)
            warm.wait_generic(5)
        command = [harness.PYTHON, "-I", "-S", "-c", HEAVY_IMPORT, libraries]
        times["fresh import of numpy + pandas"] = [harness.run_s(command) for _ in range(5)]
    for label, values in times.items():
        report.row(label, **harness.milliseconds(values))
    _judge(report, times)
    report.finish()


COLD = {"keepAliveSeconds": 0.5}


def _build_heavy(server: harness.Server) -> str:
    """Build the environment; returns the folder of its libraries."""
    spec = b'{"requirements": "%s", "preload": ["numpy", "pandas"], "genericMin": 1}'
    body = spec % REQUIREMENTS.replace("\n", "\\n").encode()
    last = server.admin("PUT", "/namespaces/default/environments/heavy", body)[-1]
    if "environment" not in last:
        raise RuntimeError(str(last))
    (folder,) = [p.parent for p in (harness.Path(server.data) / "environments").glob("*/pandas")]
    return str(folder)


def _judge(report: harness.Report, times: dict[str, list[float]]) -> None:
    middle = {label: harness.median(values) for label, values in times.items()}
    small = times["cold, small"]
    python = middle["python"]
    fresh = middle["fresh import of numpy + pandas"]
    report.bar("cold p50 / python", middle["cold, small"] / python, 0.5)
    report.bar("cold p99 / python", harness.percentile(small, 99) / python, 1.5)
    report.bar("pool miss p50 / bwrap python", middle["pool miss"] / middle["bwrap python"], 3)
    report.bar("pool miss p50 / python", middle["pool miss"] / python, 1)
    heavy = middle["cold, numpy + pandas"]
    report.bar("heavy cold p50 / small cold p50", heavy / middle["cold, small"], 3)
    report.bar("fresh import / heavy cold p50", fresh / heavy, 20, at_least=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
