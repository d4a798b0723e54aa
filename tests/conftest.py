"""The order in which files of tests run: long ones first, so that processes beside one another end together. And
signals as a terminal has them: what nohup or `&` ignores, the processes that tests start would ignore, too."""

import signal
import threading
from pathlib import Path

LONG = (
    "test_zion.py",
    "test_hosts.py",
    "test_preprocess_pack.py",
    "test_geokr_pretrain.py",
    "test_kills.py",
    "test_geokr_distributed.py",
    "test_geokr_fused.py",
    "test_geokr_export.py",
    "test_geokr_evaluate.py",
    "test_geokr_evaluate_dense.py",
    "test_benchmarks_method.py",
    "test_benchmarks_tile_codecs.py",
    "test_pipelines_loaders.py",
    "test_benchmarks_throughput.py",
    "test_storage.py",
    "test_numbers.py",
    "test_geokr_compiling.py",
)


def pytest_configure() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items) -> None:
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(Path(item.path).name, len(LONG)))  # stable: else the order stays
