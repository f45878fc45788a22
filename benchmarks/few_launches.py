"""A few launches at odd sizes, for ``compute-sanitizer``, under which all takes many times longer:
``compute-sanitizer --tool memcheck python -m benchmarks.few_launches``."""

from benchmarks.smoke import DTYPES, examined, operations
from benchmarks.suite_settings import Size, hasten_interpreter, synchronize

ODD = Size((24, 40, 112), (1, 1, 1), "", 24, (1,), 1, ((24, 7), (40, 4), (112, 3)))


def main() -> None:
    hasten_interpreter()
    for operation in operations(ODD, DTYPES[0]):
        findings = list(examined(operation, DTYPES[0]))
        synchronize()
        print(operation.name, max((finding.error or 0.0 for finding in findings), default=None), flush=True)


if __name__ == "__main__":
    main()
