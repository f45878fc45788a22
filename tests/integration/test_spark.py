"""The UDF in a real Spark with two Python workers: the scores are BatchScorer's, faults stand in their rows."""

import os
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastmsflow import UnavailableError
from fastmsflow.inference import BatchScorer
from tests.helpers.same_rows import assert_same_row

pytest.importorskip("pandas", reason="needs pandas: pip install 'fastmsflow[spark]'")
pyspark = pytest.importorskip("pyspark", reason="needs pyspark: pip install 'fastmsflow[spark]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="needs a JVM: apt-get install openjdk-17-jre-headless"),
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning"),
]
BATCH = 5
# Idle Python workers that the tests before may have left: two cores, each with two UDFs at once.
WORKERS = 4


@pytest.fixture(scope="module")
def spark(python: Path):
    from pyspark.sql import SparkSession

    before = dict(os.environ)
    # Workers import this package.
    os.environ |= {"PYSPARK_PYTHON": str(python), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    settings = {
        "spark.driver.memory": "512m",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH),
        "spark.sql.shuffle.partitions": "2",
    }
    session = SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def scorer_udf():
    from fastmsflow.integrations.spark import scorer_udf

    return scorer_udf


@pytest.fixture(scope="module")
def files(noise_images: Path) -> list[str]:
    return [str(path) for path in sorted(noise_images.iterdir())]


@pytest.fixture(scope="module")
def expected(files: list[str], checkpoint: Path) -> list[dict]:
    import pyarrow as pa

    return BatchScorer(checkpoint)(pa.table({"path": files})).to_pylist()


def test_paths_come_back_in_their_order_with_the_scores_of_the_scorer(spark, scorer_udf, files, checkpoint, expected):
    rows = spark.createDataFrame([(f,) for f in files], "path string").coalesce(1)
    scored = rows.withColumn("result", scorer_udf(checkpoint)("path")).collect()
    assert [row.path for row in scored] == files
    for row, one in zip(scored, expected, strict=True):
        assert_same_row(row.result.asDict(), one)
    # Both labels and regions are among them, or their columns would show nothing.
    assert {row.result.defective for row in scored} == {True, False}
    assert all(row.result.largest_region > 0 and row.result.fault is None for row in scored)


def test_files_as_spark_reads_them_score_alike_by_content_and_by_path(
    spark, scorer_udf, noise_images, files, checkpoint, expected
):
    score = scorer_udf(checkpoint)
    read = spark.read.format("binaryFile").load(str(noise_images))
    scored = read.select("path", score("content").alias("of_bytes"), score("path").alias("of_path")).collect()
    by_name = {Path(file).name: one for file, one in zip(files, expected, strict=True)}
    assert sorted(Path(row.path).name for row in scored) == sorted(by_name)
    for row in scored:
        assert_same_row(row.of_bytes.asDict(), by_name[Path(row.path).name])
        assert_same_row(row.of_path.asDict(), by_name[Path(row.path).name])


def test_a_fault_stands_in_its_row_and_calls_the_image_by_its_name(spark, scorer_udf, files, checkpoint, expected):
    good = Path(files[0]).read_bytes()
    content = [(0, "a", good), (1, "b", b"no image"), (2, "c", None), (3, "d", good[:200]), (4, "e", good)]
    rows = spark.createDataFrame(content, "number int, name string, content binary").repartition(2)
    scored = rows.withColumn("result", scorer_udf(checkpoint)("content", "name")).orderBy("number").collect()
    faults = [row.result.fault for row in scored]
    assert faults[0] is faults[4] is None
    assert faults[1].startswith("b: not an image that can be read")
    assert faults[2] == "c: the column bytes is empty here"
    assert faults[3].startswith("d: damaged or truncated")
    for row in scored[1:4]:
        assert {value for name, value in row.result.asDict().items() if name != "fault"} == {None}
    assert_same_row(scored[0].result.asDict(), expected[0])
    assert_same_row(scored[4].result.asDict(), expected[0])


def test_a_file_that_is_not_there_and_a_null_among_paths_are_faults(spark, scorer_udf, files, checkpoint):
    rows = spark.createDataFrame([("/nowhere/x.png",), (None,), (files[0],)], "path string").coalesce(1)
    faults = [row[0].fault for row in rows.select(scorer_udf(checkpoint)("path")).collect()]
    assert faults[0] == "/nowhere/x.png: no such file"
    assert faults[1].endswith("the column path is empty here")
    assert faults[2] is None


def test_nulls_alone_are_faults_and_no_rows_are_no_rows(spark, scorer_udf, files, checkpoint):
    nulls = spark.createDataFrame([(None,), (None,)], "content binary")
    assert all("empty" in row[0].fault for row in nulls.select(scorer_udf(checkpoint)("content")).collect())
    assert nulls.limit(0).select(scorer_udf(checkpoint)("content")).collect() == []


def test_a_threshold_decides_the_labels(spark, scorer_udf, files, checkpoint, expected):
    limit = expected[0]["absolute_score"]
    rows = spark.createDataFrame([(f,) for f in files], "path string").coalesce(1)
    labels = [row[0].defective for row in rows.select(scorer_udf(checkpoint, threshold=limit)("path")).collect()]
    assert labels == [bool(one["absolute_score"] > limit) for one in expected]
    assert len(set(labels)) == 2


def test_the_model_is_read_once_by_each_python_worker(spark, scorer_udf, files, checkpoint):
    read = []

    class Counting(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            read.append(self.path)
            super().do_GET()

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=checkpoint.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{checkpoint.name}"
        BatchScorer(url).load()
        gets_a_load = len(read)
        rows = spark.createDataFrame([(f,) for f in files], "path string").repartition(2 * WORKERS)
        assert rows.rdd.getNumPartitions() == 2 * WORKERS
        score = scorer_udf(url)
        for _ in range(2):
            assert all(row[0].fault is None for row in rows.select(score("path")).collect())
        assert 1 <= len(read) / gets_a_load - 1 <= WORKERS
        # Another UDF does not trust what an earlier one has read.
        read.clear()
        rows.select(scorer_udf(url)("path")).collect()
        assert read
        server.shutdown()


def test_the_fields_are_those_of_the_results_of_every_engine(spark, scorer_udf, checkpoint):
    from pyspark.sql.pandas.types import to_arrow_schema

    from fastmsflow.inference.arrow import RESULTS

    assert to_arrow_schema(scorer_udf(checkpoint).returnType).equals(RESULTS)


@pytest.mark.parametrize("column", ["number", "list", "struct"])
def test_a_column_of_another_type_ends_the_job_with_one_line(spark, scorer_udf, checkpoint, column):
    made = "1 AS number, array(1.5) AS list, struct(1 AS a) AS struct"
    rows = spark.sql(f"SELECT {made}")
    with pytest.raises(Exception, match=r"InputError: scorer_udf got a column of \w+; give it a binary column"):
        rows.select(scorer_udf(checkpoint)(column)).collect()


def test_a_model_that_is_not_there_ends_the_job_with_one_line(spark, scorer_udf, files):
    rows = spark.createDataFrame([(files[0],)], "path string")
    with pytest.raises(Exception, match=r"InputError: /nowhere/model.safetensors: no such file; give the path"):
        rows.select(scorer_udf("/nowhere/model.safetensors")("path")).collect()


def test_a_wrong_argument_is_told_before_any_job(scorer_udf, checkpoint):
    with pytest.raises(ValueError, match="dtype int8: give"):
        scorer_udf(checkpoint, dtype="int8")


def test_a_task_uses_the_gpu_that_spark_has_given_it(monkeypatch):
    from fastmsflow.integrations.spark import _device

    resources = {"gpu": SimpleNamespace(addresses=["3"])}
    task = SimpleNamespace(resources=lambda: resources)
    monkeypatch.setattr(pyspark.TaskContext, "get", lambda: task)
    assert _device("auto") == "cuda:3"
    assert _device("cpu") == "cpu"
    resources.clear()
    assert _device("auto") == "auto"


def test_without_spark_the_extra_is_named(scorer_udf, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark.sql.functions", None)
    with pytest.raises(UnavailableError, match=r"pip install 'fastmsflow\[spark\]'"):
        scorer_udf("model.safetensors")
