"""The papers' experiments measure what they claim. No test here is about speed."""

import gzip
import json
import math
import shutil
import subprocess
from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.cases import OpCase
from benchmarks.implementations import Calls, Inputs
from benchmarks.oracles import Oracles
from benchmarks.pages import number
from benchmarks.paper import corpus, learning, length, page, recall, training
from benchmarks.paper.models import ABLATIONS, SIZE, TABLES
from benchmarks.paper.operator import VANILLA
from benchmarks.speed import SpeedCase
from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.training import PackedDataset

PROSE = "This is the text of a page, and it is there to be read by all who have an hour for it."


def runs(folder):
    return json.loads((folder / "paper.json").read_text())["runs"]


class TestCorpus:
    def test_pages_give_blocks_without_menus_and_scripts(self):
        page = """<html><head><title>t</title></head><body><nav>Next</nav><h1>A &amp; B¶</h1><!-- no -->
        <p>One <b>bold</b>
        word</p><script>x < 1</script><pre>def f():
    return <i>1</i>
</pre><ul><li>first<li>second</ul></body></html>"""
        assert corpus.page_blocks(page) == [
            "A & B", "One bold word", "def f():\n    return 1", "first", "second"
        ]  # fmt: skip

    def test_plain_text_gives_paragraphs(self):
        assert corpus.plain_blocks("a\nb\r\n\r\n  c\n \n\n\nd\n") == ["a\nb", "  c", "d"]

    def test_long_blocks_come_once_and_short_ones_some_times(self):
        own = [f"{PROSE * 6} {i}" for i in range(corpus.REPEATS + 1)]
        documents = [(str(i), ["Note", PROSE * 2, text]) for i, text in enumerate(own)]
        documents.append(("again", documents[0][1]))
        package = corpus.Package("p", "1", "", "", documents)
        first, *middle = [f"Note\n{text}" for text in own[: corpus.REPEATS]]
        first = first.replace("\n", f"\n{PROSE * 2}\n")
        expected = [(f"p/{i}", text) for i, text in enumerate([first, *middle, own[-1]])]
        assert list(corpus.distinct_texts(package, Counter())) == expected

    def test_documents_of_other_languages_and_of_code_are_left_out(self):
        assert corpus.is_prose(PROSE)
        assert not corpus.is_prose("Dies ist der Text einer Seite, die jeder lesen kann, der eine Stunde Zeit hat.")
        assert not corpus.is_prose("int main(void) { return printf(x); }")
        assert not corpus.is_prose("")

    def test_splits_have_their_shares(self):
        found = Counter(corpus.split_of(str(i)) for i in range(20_000))
        for name, share in corpus.SPLITS.items():
            assert found[name] / 20_000 == pytest.approx(share, rel=0.2)
        assert corpus.split_of("a text") == corpus.split_of("a text")

    def test_long_texts_are_cut_at_lines_and_nothing_is_lost(self, monkeypatch):
        monkeypatch.setattr(corpus, "MOST_CHARACTERS", 3000)
        blocks = [f"{PROSE} And {i}." for i in range(100)]
        package = corpus.Package("p", "1", "", "", [("long.txt", blocks)])
        pieces = [text for _, text in corpus.distinct_texts(package, Counter())]
        assert "".join(pieces) == "\n".join(blocks)
        assert all(len(piece) <= 3000 for piece in pieces)
        assert all(piece.endswith("\n") for piece in pieces[:-1])

    def test_damaged_and_binary_files_are_left_out(self, tmp_path):
        for name, content, text in (
            ("a.txt", b"\xef\xbb\xbfone \xff", "one \ufffd"),
            ("b.gz", gzip.compress(b"two"), "two"),
            ("cut.gz", gzip.compress(b"three" * 100)[:-12], None),
            ("wrong.gz", gzip.compress(b"four" * 100)[:12] + b"\xff" * 40, None),
            ("binary", b"a\0b", None),
        ):
            (tmp_path / name).write_bytes(content)
            assert corpus.read_text(tmp_path / name) == text, name

    @pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="makes a package with dpkg-deb")
    def test_packages_become_a_corpus(self, tmp_path, monkeypatch):
        root = tmp_path / "root"
        documentation = root / "usr/share/doc/novel"
        documentation.mkdir(parents=True)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text(
            "Package: novel\nVersion: 1.2-3\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a novel\n"
        )
        (documentation / "copyright").write_text("Public domain")
        for i in range(600):
            (documentation / f"{i}.html").write_text("".join(f"<p>{PROSE} It is {i}, {j}.</p>" for j in range(6)))
        (documentation / "changelog").write_text(PROSE * 10)
        (documentation / "data.bin").write_bytes(b"\0" * 1000)
        file = tmp_path / "novel_1.2-3_all.deb"
        subprocess.run(["dpkg-deb", "--build", "-Znone", root, file], check=True, capture_output=True)
        monkeypatch.setattr(corpus, "download", lambda packages, folder: [file])
        lines = []
        corpus.build(tmp_path / "out", ["novel"], lines.append)
        manifest = json.loads((tmp_path / "out/manifest.json").read_text())
        assert (tmp_path / "out/licences/novel").read_text() == "Public domain"
        assert [package["package"] for package in manifest["packages"]] == ["novel"]
        assert manifest["packages"][0] | {"version": "1.2-3", "documents": 600} == manifest["packages"][0]
        for split, counts in manifest["splits"].items():
            texts = list(learning.texts(tmp_path / f"out/{split}.jsonl"))
            assert counts["documents"] == len(texts) > 0
            assert counts["words"] == sum(len(text.split()) for text in texts)
            assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert lines[0].startswith("novel 1.2-3: ")

    def test_a_failed_download_says_why_and_leaves_nothing(self, bench, tmp_path, capsys):
        with pytest.raises(SystemExit):
            bench("paper", "corpus", "--package", "no-such-package-of-debian", "--output", tmp_path / "out")
        assert "apt-get" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestOperator:
    def test_the_left_product_is_the_operator(self):
        inputs = Inputs(OpCase(2, 48, 3, 16, torch.float32), torch.device("cpu"))
        (implementation,) = (x for x in VANILLA if x.device == "cpu")
        assert Oracles(inputs).error(Calls(implementation, inputs)) < 1e-5

    def test_the_command_measures_all(self, bench, tmp_path):
        sizes = "--length 32 --length 64 --softmax-up-to 32 --heads 2 --head-dim 16 --seconds 0 --device cpu"
        bench("paper", "operator", *sizes.split(), "--output", tmp_path)
        results = runs(tmp_path)["paper-operator"]["results"]
        assert [(x["length"], "not_measured" in x) for x in results] == [
            (64, False), (64, True), (64, True), (32, False), (32, False), (32, False)
        ]  # fmt: skip
        short, long = rows(page.operator(results))
        milliseconds = [results[3][direction]["milliseconds"] for direction in ("forward", "backward")]
        assert short[:2] == ["32", " / ".join(map(number, milliseconds))]
        assert [long[0], *long[2:4], *long[5:]] == ["64", "not measured", "not measured", "", ""]


class TestTraining:
    def test_published_figures_are_beside_the_same_sizes(self):
        assert training.published(SpeedCase("385M", 1024, 1 << 16), training.OURS) == 38615
        assert training.published(SpeedCase("3B", 65536, 1 << 16), training.SOFTMAX) is None
        assert training.published(SpeedCase("1B", 94208, 94208), training.LIGHTNING1) is None
        assert training.published(SpeedCase("385M", 94208, 94208), training.LIGHTNING1) == 6012
        assert training.published(SpeedCase("demo", 1024, 1024), training.OURS) is None
        assert training.published(SpeedCase("385M", 512, 1024), training.OURS) is None
        assert all(len(figures) == len(training.LENGTHS) for figures in training.PUBLISHED.values())

    def test_the_command_measures_three_systems(self, bench, tmp_path):
        sizes = "--length 16 --tokens 32 --steps 1 --device cpu"
        bench("paper", "training", *sizes.split(), "--output", tmp_path)
        results = runs(tmp_path)["paper-training"]["results"]
        assert [record["implementation"] for record in results] == list(training.SYSTEMS)
        assert rows(page.training(results)) == [["demo", "16", *(f"{x['tokens_per_second']:,.0f}" for x in results)]]
        assert all(record["tokens_per_second"] > 0 and record["batch_size"] == 2 for record in results)


def test_generation_reports_the_best_batch(bench, tmp_path):
    sizes = "--prompt 4 --new 3 --batch-size 1 --batch-size 4 --device cpu"
    bench("paper", "generation", *sizes.split(), "--output", tmp_path)
    results = runs(tmp_path)["paper-generation"]["results"]
    assert [row[0] for row in rows(page.generation(results))] == ["TNL", "LLaMA"]
    for record in results:
        rates = record["by_batch_size"]
        assert list(rates) == ["1", "4"]
        assert record["tokens_per_second"] == rates[str(record["batch_size"])] == max(rates.values())


class TestLearning:
    def test_every_model_of_the_tables_can_be_made(self):
        for rows in TABLES.values():
            assert len({learning.slug(row.name) for row in rows}) == len(rows)
            for row in rows:
                LightningForCausalLM(row.config(64, **SIZE | {"hidden_size": 16, "intermediate_size": 8}, vocab_size=8))

    def test_an_ablation_differs_from_tnl_in_what_it_says(self):
        tnl = ABLATIONS[0].config(64, **SIZE, vocab_size=8).to_diff_dict()
        for row in ABLATIONS[1:]:
            config = row.config(64, **SIZE, vocab_size=8).to_diff_dict()
            changed = {name for name in config.keys() | tnl.keys() if config.get(name) != tnl.get(name)}
            assert changed - {"positions"} <= set(row.options), row.name
            assert changed, row.name

    def test_the_loss_is_the_mean_of_all_predicted_tokens(self):
        model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=32)).eval()
        tokens = np.arange(200) % 31
        dataset = PackedDataset(tokens, 16, document_starts=np.array([0, 5, 40, 100]))
        total = count = 0.0
        for item in dataset:
            ids, labels, positions = (item[name][None] for name in ("input_ids", "labels", "position_ids"))
            logits = model(ids, position_ids=positions, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
            total, count = total + losses.sum().item(), count + (labels[:, 1:] >= 0).sum().item()
        assert learning.loss_of(model, dataset, "float32") == pytest.approx(total / count, rel=1e-5)

    def test_the_tokenizer_frames_documents_and_keeps_text(self):
        tokenizer = learning.train_tokenizer(iter([PROSE] * 50), 300)
        assert len(tokenizer) <= 300
        assert tokenizer.bos_token == tokenizer.eos_token == learning.END
        text = "Any text: ünïcödé, too."
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text

    @pytest.mark.slow
    def test_models_learn_and_are_read_beyond_the_trained_length(self, bench, tmp_path):
        splits = write_corpus(tmp_path / "corpus")
        sizes = "--device cpu --length 32 --batch-size 2 --steps 2"
        folders = "--corpus", tmp_path / "corpus", "--output", tmp_path
        bench("paper", "learn", "--table", "quality", *sizes.split(), *folders, "--keep", tmp_path / "keep")
        results = runs(tmp_path)["paper-quality"]["results"]
        assert [record["implementation"] for record in results] == [row.name for row in TABLES["quality"]]
        assert [row[-1] for row in rows(page.learned(results))] == [str(x["published"] or "") for x in results]
        for record in results:
            assert record["trained_tokens"] == 128
            # Nats of the test text, by both of its sizes.
            nats = math.log(record["word_perplexity"]) * splits["test"]["words"]
            bits = record["bits_per_byte"] * splits["test"]["bytes"]
            assert nats == pytest.approx(bits * math.log(2), rel=1e-2)
            assert record["loss"] == pytest.approx(record["validation_loss"], rel=0.1)
        sizes = "--device cpu --length 80 --documents 2 --tuning-steps 1 --tuning-tokens 80"
        bench("paper", "length", "--runs", tmp_path / "keep", *sizes.split(), *folders)
        results = runs(tmp_path)["paper-length"]["results"]
        assert rows(page.by_length(results))[0] == [results[0]["implementation"], f"{results[0]['loss']['1-79']:.2f}"]
        results = {x["implementation"]: x["loss"] for x in results}
        assert len(results) == 5
        assert all(list(loss) == ["1-79"] and loss["1-79"] > 0 for loss in results.values())
        for arguments in (
            ("length", "--runs", tmp_path / "none", *sizes.split()),
            ("learn", "--table", "quality", "--device", "cpu", "--keep", tmp_path / "keep"),
        ):
            with pytest.raises(SystemExit):
                bench("paper", *arguments, *folders)


def write_corpus(folder):
    """Write texts as `paper corpus` does, and return their sizes."""
    folder.mkdir()
    splits = {}
    for split, count in (("train", 200), ("validation", 10), ("test", 10)):
        texts = [f"{PROSE} {i} of {split}. " * 8 for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        splits[split] = {
            "documents": count,
            "bytes": sum(len(text.encode()) for text in texts),
            "words": sum(len(text.split()) for text in texts),
        }
    (folder / corpus.MANIFEST).write_text(json.dumps({"splits": splits}))
    return splits


class TestLength:
    def test_ranges_cover_all_predicted_positions_once(self):
        for tokens in (2, 100, 256, 257, 16384):
            covered = [p for first, last in length.ranges(tokens) for p in range(first, last + 1)]
            assert covered == list(range(1, tokens))

    def test_streaming_within_the_window_equals_whole_documents(self):
        config = LightningConfig.from_size(
            "demo", vocab_size=32, layer_pattern="0:1", block="llama", max_position_embeddings=64
        )
        model, ids = LightningForCausalLM(config).eval(), torch.randint(32, (2, 40))
        whole = length.whole_losses(model, ids, "float32")
        torch.testing.assert_close(length.streaming_losses(model, ids, "float32"), whole, rtol=1e-4, atol=1e-4)


class TestRecall:
    def test_questions_repeat_the_needles(self):
        T, needles = 100, 7
        asked = torch.randint(needles, (5, 9), generator=torch.Generator().manual_seed(1))
        batch = recall.haystacks(5, T, needles, asked, torch.Generator().manual_seed(0))
        for ids, labels, order in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), asked, strict=True):
            hay, questions = ids[: T - 18], ids[T - 18 :]
            hidden = {key: value for key, value in pairwise(hay) if key < recall.KEYS}
            assert len(hidden) == needles
            assert [hidden[key] for key in questions[::2]] == questions[1::2]
            assert len(set(questions[::2])) == len(order.unique())
            assert labels[: T - 18] == [-100] * (T - 18)
            assert labels[T - 18 :: 2] == [-100] * 9
            assert labels[T - 17 :: 2] == questions[1::2]

    def test_training_has_one_needle_up_to_all_and_answers_that_do_not_follow_from_each_other(self):
        """An answer is no likelier to be one that has not been given yet."""
        case = recall.RecallCase({}, 4, 64, (64,), 32, 1, 1e-3, "float32")
        counts, repeated = set(), []
        for batch in islice(recall._batches(case), 60):
            for ids in batch["input_ids"].tolist():
                hidden = [key for key, _ in pairwise(ids[:48]) if key < recall.KEYS]
                first, second, *_ = ids[48::2]
                counts.add(len(hidden))
                repeated += [first == second] * (len(hidden) == 4)
        assert counts == {1, 2, 3, 4}
        assert sum(repeated) / len(repeated) == pytest.approx(1 / 4, abs=0.08)

    @pytest.mark.parametrize("shift", [0, 1])
    def test_accuracy_counts_right_answers(self, shift):
        """A model that looks up every key finds all, one that is always off by one finds none."""

        class Lookup:
            device = torch.device("cpu")

            def __call__(self, ids, use_cache, logits_to_keep):
                row = ids[0].tolist()
                known = {key: value for key, value in pairwise(row) if key < recall.KEYS}
                answers = [known.get(token, 0) + shift for token in row[-logits_to_keep:]]
                return SimpleNamespace(logits=torch.eye(512)[answers][None])

        found = recall.accuracy(Lookup(), 64, 4, "float32")  # pyright: ignore[reportArgumentType]
        assert found == 1 - shift

    def test_too_short_sequences_are_refused(self):
        with pytest.raises(ValueError, match="8 needles and their questions need 48 tokens, got 47"):
            recall.haystacks(1, 47, 8, torch.zeros(1, 16, dtype=torch.int64), torch.Generator())

    def test_the_command_trains_and_tests_three_models(self, bench, tmp_path, monkeypatch):
        monkeypatch.setattr(recall, "TESTED", 4)
        sizes = "--needles 2 --length 16 --tested 16 --tested 32 --batch-size 2 --steps 2 --device cpu"
        bench("paper", "recall", *sizes.split(), "--output", tmp_path)
        results = runs(tmp_path)["paper-recall"]["results"]
        assert [record["implementation"] for record in results] == list(recall.SYSTEMS)
        assert all(list(record["found"]) == ["16", "32"] for record in results)
        assert [row[0] for row in rows(page.recall(results))] == list(recall.SYSTEMS)


def test_pages_say_what_was_not_measured_and_what_was_published():
    training_record = {"size": "1B", "length": 94208, "published": None}
    lost = {"implementation": training.OURS, "not_measured": "OutOfMemoryError: of a GPU"} | training_record
    found = {"implementation": training.SOFTMAX, "tokens_per_second": 12345.0} | training_record | {"published": 2558}
    assert rows(page.training([lost, found])) == [["1B", "92K", "out of memory", "not measured", "12,345 (2,558)"]]
    sizes = {"trained_tokens": 1, "length": 1, "dtype": "float32", "seed": 0, "published": None}
    (row,) = rows(page.learned([{"implementation": "TNL", "not_measured": "ValueError: no"} | sizes]))
    assert row[:2] == ["TNL", "ValueError: no"]


def test_ablations_are_compared_with_tnl_of_the_same_seed():
    sizes = {"trained_tokens": 1, "length": 1, "dtype": "float32"}
    tnl = {"implementation": "TNL", "published": 2.2} | sizes
    other = {"implementation": "gate: none", "published": 2.3} | sizes
    results = [tnl | {"seed": 0, "loss": 4.0}, other | {"seed": 0, "loss": 4.5}, tnl | {"seed": 1, "loss": 4.25}]
    first, second = rows(page.ablations(results))
    assert first == ["TNL", "4.0000", "", "4.2500", "", "2.200", ""]
    assert second == ["gate: none", "4.5000", "+0.500", "", "", "2.300", "+0.100"]


def test_results_of_other_commits_are_named_once():
    record = {"size": "1B", "length": 1024, "published": 1000, "commit": "0123456789"}
    systems = (training.OURS, 4000.0), (training.SOFTMAX, 2000.0)
    text = page.training([record | {"implementation": name, "tokens_per_second": rate} for name, rate in systems])
    assert text.count("1B at 1K: commit `01234567`.") == 1
    assert "Lightning-2 has 4.0 to 4.0 (1B) times the paper's tokens/s." in text


def rows(text):
    """Cells of the rows of a table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learn", "--table", "speed"], "--table must be one of quality, exactness, ablations"),
        (["learn", "--table", "quality", "--model", "GPT"], "--model must be one of TNL (lightning), "),
        (["learn", "--table", "quality", "--dtype", "float16"], "--dtype must be float32 or bfloat16 to train"),
        (["learn", "--table", "quality", "--corpus", "none"], "there is no corpus in none: make one with"),
        (["recall", "--needles", "33", "--length", "400"], "--needles must be at most 32"),
        (["recall", "--model", "LLaMA"], "--model must be one of TNL (lightning), TNL with softmax 7:1, "),
        (["recall", "--needles", "8", "--length", "20"], "--length must be at least 48"),
        (["training", "--size", "2B"], "--size must be one of"),
        (["corpus", "--package", "-o=x"], "'-o=x' is not the name of a Debian package"),
        (["corpus", "--package", "novel=1.2"], "'novel=1.2' is not the name of a Debian package"),
        (["generation", "--new", "0"], "--new must be at least 1"),
    ],
)
def test_options_are_checked(bench, tmp_path, capsys, arguments, message):
    device = [] if arguments[0] == "corpus" else ["--device", "cpu"]
    with pytest.raises(SystemExit):
        bench("paper", *arguments, *device, "--output", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
