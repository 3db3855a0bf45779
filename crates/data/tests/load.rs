//! Files of rows to documents, batches and a report.

mod byte_level;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use byte_level::{BOS, EOS, IM_END, IM_START, LO, bytes, tokenizer};
use emberlora_config::{ChatTemplateChoice, LossOn, Overflow};
use emberlora_data::{
    Compression, DataError, DataOptions, Dataset, Document, DropReason, Format, NoProgress, Outcome, PrefixSharing,
    Progress, Source, inspect,
};
use tempfile::TempDir;

fn options(sources: Vec<Source>) -> DataOptions {
    DataOptions {
        sources,
        chat_template: ChatTemplateChoice::Auto,
        loss_on: LossOn::Assistant,
        max_seq_len: 512,
        overflow: Overflow::Truncate,
        packing: false,
        share_prefix: PrefixSharing::On,
        shuffle: false,
        batch_size: 2,
        seed: 42,
    }
}

/// A file of rows in a directory that lives as long as it.
struct Rows {
    directory: TempDir,
    path: PathBuf,
}

impl Rows {
    fn new(content: impl AsRef<[u8]>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.jsonl");
        std::fs::write(&path, content).unwrap();
        Rows { directory, path }
    }

    fn source(&self) -> Source {
        Source::new(self.path.clone(), None, 1.0)
    }

    fn load(&self, change: impl FnOnce(&mut DataOptions)) -> Result<Dataset, DataError> {
        let mut options = options(vec![self.source()]);
        change(&mut options);
        Dataset::load(options, &tokenizer(), &NoProgress)
    }

    fn only_document(&self, change: impl FnOnce(&mut DataOptions)) -> Document {
        let dataset = self.load(change).unwrap();
        let [document] = dataset.documents() else { panic!("{:?}", dataset.report) };
        document.clone()
    }
}

/// Joins parts into ids and labels; `true` marks a trained part.
fn labelled(parts: &[(&[u32], bool)]) -> (Vec<u32>, Vec<i64>) {
    let ids = parts.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    let labels = parts
        .iter()
        .flat_map(|&(ids, trained)| ids.iter().map(move |&id| if trained { i64::from(id) } else { -100 }))
        .collect();
    (ids, labels)
}

#[track_caller]
fn check(row: &str, change: impl FnOnce(&mut DataOptions), expected: &[(&[u32], bool)]) {
    let document = Rows::new(row).only_document(change);
    assert_eq!((document.ids.clone(), document.labels()), labelled(expected));
}

#[track_caller]
fn refused(content: impl AsRef<[u8]>, change: impl FnOnce(&mut DataOptions), expected: &[&str]) {
    let message = Rows::new(content).load(change).unwrap_err().to_string();
    for part in expected {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[test]
fn a_completion_is_trained_with_its_eos_and_the_prompt_is_not() {
    let row = r#"{"prompt": "2+2=", "completion": "4"}"#;
    let (prompt, completion) = (bytes("2+2="), bytes("4"));
    check(row, |_| {}, &[(&[BOS], false), (&prompt, false), (&completion, true), (&[EOS], true)]);
    let all = |options: &mut DataOptions| options.loss_on = LossOn::All;
    check(row, all, &[(&[BOS], false), (&prompt, true), (&completion, true), (&[EOS], true)]);
}

#[test]
fn a_completion_that_ends_with_eos_gets_no_second_one() {
    let row = r#"{"prompt": "a:", "completion": " b</s>"}"#;
    check(row, |_| {}, &[(&[BOS], false), (&bytes("a:"), false), (&bytes(" b"), true), (&[EOS], true)]);
}

#[test]
fn a_prompt_keeps_the_tokens_it_has_on_its_own() {
    // Together `l` and `o` would be one token.
    let row = r#"{"prompt": "l", "completion": "olo"}"#;
    check(row, |_| {}, &[(&[BOS], false), (&bytes("l"), false), (&bytes("o"), true), (&[LO, EOS], true)]);
}

#[test]
fn a_text_is_trained_as_a_whole_and_ended() {
    check(r#"{"text": "a é"}"#, |_| {}, &[(&[BOS], false), (&bytes("a é"), true), (&[EOS], true)]);
}

#[test]
fn tokens_are_taken_as_they_are() {
    let row = r#"{"input_ids": [257, 7, 8, 9], "labels": [-100, -100, 8, 9]}"#;
    check(row, |_| {}, &[(&[257, 7], false), (&[8, 9], true)]);
}

#[test]
fn a_label_on_the_first_token_counts_for_nothing() {
    check(r#"{"input_ids": [7, 8], "labels": [7, 8]}"#, |_| {}, &[(&[7], false), (&[8], true)]);
}

#[test]
fn an_assistant_turn_is_trained_with_its_end_of_turn() {
    let row = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}"#;
    let document = Rows::new(row).only_document(|options| options.chat_template = ChatTemplateChoice::Chatml);
    let trained: Vec<u32> =
        document.ids.iter().zip(&document.trained).filter(|&(_, &trained)| trained).map(|(&id, _)| id).collect();
    assert!(trained.starts_with(&[&bytes("yes")[..], &[IM_END]].concat()), "{trained:?}");
    assert!(!trained.contains(&IM_START));
    assert!(document.ids.starts_with(&[&[IM_START][..], &bytes("user\nhi")[..], &[IM_END]].concat()));
}

#[test]
fn alpaca_rows_are_turns_with_a_template_and_the_classic_prompt_without() {
    let row = r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#;
    let chatml = |options: &mut DataOptions| options.chat_template = ChatTemplateChoice::Chatml;
    let chat = r#"{"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]}"#;
    let (as_alpaca, as_chat) = (Rows::new(row).only_document(chatml), Rows::new(chat).only_document(chatml));
    assert_eq!((as_alpaca.ids, as_alpaca.trained), (as_chat.ids, as_chat.trained));

    let (ids, labels) = {
        let document = Rows::new(row).only_document(|_| {});
        (document.ids.clone(), document.labels())
    };
    let text = tokenizer().decode(&ids, false).unwrap();
    assert!(text.starts_with("<s>Below is an instruction that describes a task, paired with an input"), "{text}");
    assert!(text.ends_with("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"), "{text}");
    assert_eq!(labels.iter().filter(|&&label| label != -100).copied().collect::<Vec<_>>(), [51, 258]);
    let bare = Rows::new(r#"{"instruction": "Add.", "input": "", "output": "3"}"#).only_document(|_| {});
    let text = tokenizer().decode(&bare.ids, false).unwrap();
    assert!(!text.contains("### Input") && text.contains("describes a task. Write a response"), "{text}");
}

#[test]
fn a_conversation_without_a_template_says_what_to_set() {
    let row = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}"#;
    refused(row, |_| {}, &["rows.jsonl:1", "no chat template", "chatml"]);
}

#[test]
fn the_report_says_which_format_the_first_row_chose() {
    let rows = Rows::new("\u{feff}{\"text\": \"one\"}\r\n\r\n{\"text\": \"two\"}\r\n{\"text\": \"three\"}");
    let report = rows.load(|_| {}).unwrap().report;
    assert_eq!(report.files[0].format.format, Format::Text);
    assert!(report.files[0].format.detected);
    let counts = report.counts;
    assert_eq!((counts.rows, counts.documents, counts.tokens, counts.trained_tokens), (3, 3, 17, 14));
    assert!(report.to_string().contains("format text (chosen from its first row), 3 rows"), "{report}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["files"][0]["format"], "text");
    assert_eq!(json["files"][0]["compression"], "plain");
    assert_eq!(json["trained_tokens"], 14);
    drop(rows.directory);
}

#[test]
fn a_row_that_does_not_fit_is_named_by_file_and_line() {
    let rows = "{\"text\": \"one\"}\n\n{\"prompt\": \"p\", \"completion\": \"c\"}\n";
    refused(rows, |_| {}, &["rows.jsonl:3: ", "`text` (chosen from the first row)", "`text` is missing", "`prompt`"]);
    refused("{\"text\": \"one\"}\n{\"text\": \n", |_| {}, &["rows.jsonl:2: ", "not valid JSON"]);
    refused(b"{\"text\": \"\xfe\"}", |_| {}, &["rows.jsonl:1: ", "UTF-8"]);
    refused("[\n{\"text\": \"one\"}]", |_| {}, &["rows.jsonl:1: ", "JSON Lines"]);
    refused("{\"input_ids\": [9999], \"labels\": [-100]}", |_| {}, &["rows.jsonl:1: ", "9999", "261 entries"]);
}

#[test]
fn the_first_bad_row_of_many_is_the_one_reported() {
    let mut rows = String::new();
    for line in 1..=5000 {
        rows += if line % 1000 == 7 { "{\"text\": 1}\n" } else { "{\"text\": \"x\"}\n" };
    }
    refused(rows, |_| {}, &["rows.jsonl:7: ", "found the number 1"]);
}

#[test]
fn empty_and_missing_files_are_errors() {
    refused("", |_| {}, &["rows.jsonl: contains no rows"]);
    refused("\u{feff}\n \r\n", |_| {}, &["rows.jsonl: contains no rows"]);
    let missing = Source::new(PathBuf::from("no/such/rows.jsonl"), None, 1.0);
    let error = Dataset::load(options(vec![missing]), &tokenizer(), &NoProgress).unwrap_err();
    assert!(matches!(error, DataError::Open { .. }), "{error}");
    let none = Dataset::load(options(vec![]), &tokenizer(), &NoProgress).unwrap_err();
    assert!(matches!(none, DataError::NoSources));
}

#[test]
fn compressed_files_hold_the_same_documents() {
    let text = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(text.as_bytes()).unwrap();
    let kinds = [
        (Compression::Plain, text.as_bytes().to_vec()),
        (Compression::Gzip, gzip.finish().unwrap()),
        (Compression::Zstd, zstd::encode_all(text.as_bytes(), 0).unwrap()),
    ];
    let ids = |dataset: &Dataset| dataset.documents().iter().map(|d| d.ids.clone()).collect::<Vec<_>>();
    for (compression, content) in kinds {
        // The name says nothing about the content.
        let dataset = Rows::new(&content).load(|_| {}).unwrap();
        assert_eq!(
            ids(&dataset),
            [[&[BOS], &bytes("one")[..], &[EOS]].concat(), [&[BOS], &bytes("two")[..], &[EOS]].concat()]
        );
        let file = &dataset.report.files[0];
        assert_eq!((file.compression, file.bytes), (compression, content.len() as u64));
        assert_eq!(file.sha256.len(), 64);
    }
}

const LONG: &str = r#"{"prompt": "0123456789", "completion": "abcdef"}
{"prompt": "0", "completion": "a"}"#;

#[test]
fn truncation_keeps_the_first_tokens_and_drops_rows_that_lose_all_labels() {
    let dataset = Rows::new(LONG).load(|options| options.max_seq_len = 13).unwrap();
    assert_eq!(dataset.documents()[0].ids, [&[BOS], &bytes("0123456789ab")[..]].concat());
    assert_eq!((dataset.report.counts.truncated, dataset.report.counts.dropped), (1, 0));
    let dataset = Rows::new(LONG).load(|options| options.max_seq_len = 11).unwrap();
    let counts = dataset.report.counts;
    assert_eq!((counts.truncated, counts.dropped, counts.untrained, counts.documents), (0, 1, 1, 1));
    assert!(dataset.report.to_string().contains("1 dropped (0 too long, 1 without a trained token)"));
}

#[test]
fn long_rows_are_dropped_or_refused_as_the_recipe_says() {
    let dataset = Rows::new(LONG)
        .load(|options| {
            options.max_seq_len = 13;
            options.overflow = Overflow::Drop;
        })
        .unwrap();
    let counts = dataset.report.counts;
    assert_eq!((counts.rows, counts.documents, counts.dropped, counts.too_long), (2, 1, 1, 1));
    let strict = |options: &mut DataOptions| {
        options.max_seq_len = 13;
        options.overflow = Overflow::Error;
    };
    refused(LONG, strict, &["rows.jsonl:1", "18 tokens", "max_seq_len = 13"]);
}

#[test]
fn data_in_which_nothing_is_trained_is_an_error_with_the_counts() {
    let rows = "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n{\"input_ids\": [], \"labels\": []}";
    refused(rows, |_| {}, &["no token would be trained", "2 rows", "2 have no trained token", "rows.jsonl"]);
}

#[test]
fn weights_repeat_and_sample_rows() {
    let lines = |count: usize| (0..count).map(|n| format!("{{\"text\": \"{n}\"}}\n")).collect::<String>();
    let (twice, half) = (Rows::new(lines(5)), Rows::new(lines(20)));
    let sources = vec![Source::new(twice.path.clone(), None, 2.0), Source::new(half.path.clone(), None, 0.5)];
    let mut options = options(sources);
    options.shuffle = true;
    let dataset = Dataset::load(options, &tokenizer(), &NoProgress).unwrap();
    let chosen = |path: &Path, seed, epoch| {
        let mut lines: Vec<usize> = dataset
            .batches(seed, epoch)
            .flat_map(|batch| batch.documents)
            .filter(|row| &*row.file == path)
            .map(|row| row.line)
            .collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(chosen(&twice.path, 1, 0), [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    let first = chosen(&half.path, 1, 0);
    assert_eq!(first.len(), 10);
    assert!(first.windows(2).all(|pair| pair[0] < pair[1]), "{first:?}");
    assert_eq!(first, chosen(&half.path, 1, 0));
    assert_ne!(first, chosen(&half.path, 1, 1));
    assert_ne!(first, chosen(&half.path, 2, 0));
    assert_eq!(dataset.report.counts.rows, 25);
    assert_eq!(dataset.total_steps(1, 3.0, 1), 30);

    for (weight, shown) in
        [(0.0, "weight 0 "), (-1.0, "weight -1 "), (f64::NAN, "weight NaN "), (1e5, "weight 100000 ")]
    {
        let source = vec![Source::new(twice.path.clone(), None, weight)];
        let error = Dataset::load(self::options(source), &tokenizer(), &NoProgress).unwrap_err().to_string();
        assert!(error.contains(shown) && error.contains("of at most 10000"), "{error}");
    }
}

#[test]
fn progress_covers_every_byte_of_the_files() {
    #[derive(Default)]
    struct Counted([AtomicU64; 3]);
    impl Progress for Counted {
        fn start(&self, total: u64) {
            self.0[0].store(total, Ordering::Relaxed);
        }
        fn advance(&self, bytes: u64) {
            self.0[1].fetch_add(bytes, Ordering::Relaxed);
        }
        fn finish(&self) {
            self.0[2].fetch_add(1, Ordering::Relaxed);
        }
    }
    let rows = Rows::new("{\"text\": \"some words\"}\n".repeat(60_000));
    let counted = Counted::default();
    Dataset::load(options(vec![rows.source(), rows.source()]), &tokenizer(), &counted).unwrap();
    let [total, advanced, finished] = counted.0.map(AtomicU64::into_inner);
    assert_eq!((total, advanced, finished), (2 * 23 * 60_000, total, 1));
}

#[test]
fn inspection_shows_rows_token_by_token_and_also_those_that_are_dropped() {
    let rows = Rows::new(
        "{\"prompt\": \"é:\", \"completion\": \"lo\"}\n{\"prompt\": \"0123456789\", \"completion\": \"a\"}\n{}\n{\"prompt\": \"\", \"completion\": \"\"}",
    );
    let tokenizer = tokenizer();
    let mut options = options(vec![rows.source()]);
    options.max_seq_len = 8;
    let mut inspected = inspect(options, &tokenizer).unwrap();

    let row = inspected.next().unwrap().unwrap();
    assert_eq!((row.source.line, row.format, row.outcome), (1, Format::Prompt, Outcome::Kept));
    assert_eq!(row.text, "é:lo</s>");
    assert_eq!(row.pieces, ["<s>", "", "é", ":", "lo", "</s>"]);
    assert_eq!(row.labels, [-100, -100, -100, -100, 256, 258]);
    let json = serde_json::to_value(&row).unwrap();
    assert_eq!(json["input_ids"], serde_json::json!([257, 195, 169, 58, 256, 258]));
    assert_eq!((json["text"].as_str(), json["line"].as_u64()), (Some("é:lo</s>"), Some(1)));
    assert_eq!(json["outcome"], "kept");

    let row = inspected.next().unwrap().unwrap();
    assert_eq!(row.outcome, Outcome::Dropped(DropReason::Untrained { length: 13 }));
    assert_eq!(row.ids.len(), 8);
    let json = serde_json::to_value(&row).unwrap();
    assert_eq!((json["outcome"].as_str(), json["reason"].as_str()), (Some("dropped"), Some("untrained")));
    assert!(inspected.next().unwrap().unwrap_err().to_string().contains("rows.jsonl:3"));
    assert!(inspected.next().is_none());
}

#[test]
fn the_rows_of_a_weight_above_one_are_seen_at_different_times() {
    let rows = Rows::new("{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
    let dataset = rows
        .load(|options| {
            options.packing = true;
            options.sources[0].weight = 3.0;
        })
        .unwrap();
    assert_eq!(dataset.report.share_prefix, PrefixSharing::On);
    let rows: usize = dataset.batches(0, 0).map(|batch| batch.rows).sum();
    assert_eq!(rows, 3);
}
