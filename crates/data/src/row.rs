//! One line of a file as a typed row.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::Keys;
use crate::{Conversation, Message, RowError};

/// What the rows of a file look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `{"messages": [{"role", "content"}…], "tools"?}`, rendered with the chat template; `loss_on` says what is trained.
    Chat,
    /// `{"prompt", "completion"}`, two strings without a template. The completion is trained with an eos at its end;
    /// the prompt only with `loss_on: all`.
    Prompt,
    /// `{"instruction", "input"?, "output"}`. With a chat template the instruction, a blank line and the input are a
    /// user's turn and the output the answer; without one they fill Stanford Alpaca's prompt and the output is its
    /// completion.
    Alpaca,
    /// `{"text"}`, trained as a whole with an eos at its end, whatever `loss_on` says.
    Text,
    /// `{"input_ids", "labels"}`, taken as they are: labels are unshifted, -100 where a token is not trained, and
    /// stand above `loss_on`.
    Tokens,
}

impl Format {
    /// The name used in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Format::Chat => "chat",
            Format::Prompt => "prompt",
            Format::Alpaca => "alpaca",
            Format::Text => "text",
            Format::Tokens => "tokens",
        }
    }

    /// The keys a row of this format must have.
    fn required(self) -> &'static [&'static str] {
        match self {
            Format::Chat => &["messages"],
            Format::Prompt => &["prompt", "completion"],
            Format::Alpaca => &["instruction", "output"],
            Format::Text => &["text"],
            Format::Tokens => &["input_ids", "labels"],
        }
    }

    /// The format whose keys the row has. Rows often carry a rendered `text` beside their parts, so `text` comes last.
    fn detect(object: &Map<String, Value>) -> Option<Format> {
        [Format::Chat, Format::Tokens, Format::Prompt, Format::Alpaca, Format::Text]
            .into_iter()
            .find(|format| format.required().iter().all(|&key| object.contains_key(key)))
    }
}

/// The format of a file and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct FormatChoice {
    /// The format.
    pub format: Format,
    /// Whether the first row decided, rather than the recipe.
    pub detected: bool,
}

/// A row, checked against its format.
#[derive(Clone, Debug)]
pub(crate) enum Row {
    Chat(Conversation),
    Prompt { prompt: String, completion: String },
    Alpaca { instruction: String, input: String, output: String },
    Text(String),
    Tokens { ids: Vec<u32>, trained: Vec<bool> },
}

/// Parses a line as a JSON object.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, RowError> {
    let text = std::str::from_utf8(bytes).map_err(|error| RowError::Utf8 { offset: error.valid_up_to() })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(RowError::NotAnObject { found: kind(&other), hint: hint(text) }),
        Err(error) => {
            let message = error.to_string();
            // The parser counts lines within its input, which is one line of the file.
            let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
            Err(RowError::Json { message, column: error.column(), hint: hint(text) })
        }
    }
}

/// What a file may be if its line is no object.
fn hint(text: &str) -> &'static str {
    match text.trim_start().as_bytes() {
        [b'[', ..] => {
            "; a JSON array? expected JSON Lines: one object per line, without brackets around them and commas between them"
        }
        [b'{'] => "; JSON with indentation? expected JSON Lines: one whole object per line",
        [b'P', b'A', b'R', b'1', ..] => "; a Parquet file? expected JSON Lines",
        _ => "",
    }
}

/// The format of a file whose first row this is.
pub(crate) fn detect(object: &Map<String, Value>) -> Result<FormatChoice, RowError> {
    match Format::detect(object) {
        Some(format) => Ok(FormatChoice { format, detected: true }),
        None => Err(RowError::UnknownFormat { found: keys(object) }),
    }
}

/// Reads an object as a row of a format; keys the format does not know are ignored.
pub(crate) fn parse_row(
    choice: FormatChoice,
    mut object: Map<String, Value>,
    vocab_size: usize,
) -> Result<Row, RowError> {
    if let Some(&key) = choice.format.required().iter().find(|&&key| !object.contains_key(key)) {
        return Err(RowError::MissingKey { format: choice, key, found: keys(&object) });
    }
    let mut text = |key: &str| string(choice, key.to_owned(), object.remove(key).unwrap_or(Value::Null));
    Ok(match choice.format {
        Format::Prompt => Row::Prompt { prompt: text("prompt")?, completion: text("completion")? },
        Format::Text => Row::Text(text("text")?),
        Format::Alpaca => {
            let (instruction, output) = (text("instruction")?, text("output")?);
            let input = match object.remove("input") {
                None | Some(Value::Null) => String::new(),
                Some(value) => string(choice, "input".to_owned(), value)?,
            };
            Row::Alpaca { instruction, input, output }
        }
        Format::Chat => Row::Chat(conversation(choice, object)?),
        Format::Tokens => tokens(choice, &object, vocab_size)?,
    })
}

fn string(format: FormatChoice, key: String, value: Value) -> Result<String, RowError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(wrong(format, key, "a string", &other)),
    }
}

fn conversation(format: FormatChoice, mut object: Map<String, Value>) -> Result<Conversation, RowError> {
    let messages = match object.remove("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        Some(Value::Array(_)) => {
            return Err(RowError::WrongType {
                format,
                key: "messages".to_owned(),
                expected: "a list of messages",
                found: "an empty list".to_owned(),
            });
        }
        other => return Err(wrong(format, "messages".to_owned(), "a list of messages", &other.unwrap_or(Value::Null))),
    };
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(index, value)| Message::from_json(value).map_err(|error| RowError::Message { format, index, error }))
        .collect::<Result<Vec<_>, _>>()?;
    let tools = match object.remove("tools") {
        None | Some(Value::Null) => None,
        Some(tools @ Value::Array(_)) => Some(tools),
        Some(other) => return Err(wrong(format, "tools".to_owned(), "a list of tools", &other)),
    };
    Ok(Conversation { messages, tools })
}

fn tokens(format: FormatChoice, object: &Map<String, Value>, vocab_size: usize) -> Result<Row, RowError> {
    let ids = integers(format, object, "input_ids")?;
    let labels = integers(format, object, "labels")?;
    if ids.len() != labels.len() {
        return Err(RowError::LabelCount { ids: ids.len(), labels: labels.len() });
    }
    if object.contains_key("attention_mask") {
        let mask = integers(format, object, "attention_mask")?;
        if let Some(index) = mask.iter().position(|&seen| seen == 0) {
            return Err(RowError::Padded { index });
        }
    }
    let ids = ids
        .into_iter()
        .enumerate()
        .map(|(index, id)| match u32::try_from(id) {
            Ok(small) if (small as usize) < vocab_size => Ok(small),
            _ => Err(RowError::Vocabulary { index, id, vocab_size }),
        })
        .collect::<Result<Vec<u32>, _>>()?;
    let trained = ids
        .iter()
        .zip(labels)
        .enumerate()
        .map(|(index, (&id, label))| match label {
            IGNORED => Ok(false),
            label if label == i64::from(id) => Ok(true),
            label => Err(RowError::Label { index, label, id }),
        })
        .collect::<Result<Vec<bool>, _>>()?;
    Ok(Row::Tokens { ids, trained })
}

/// The label of a token that is not trained, by the convention of PyTorch's cross entropy.
pub(crate) const IGNORED: i64 = -100;

fn integers(format: FormatChoice, object: &Map<String, Value>, key: &'static str) -> Result<Vec<i64>, RowError> {
    const EXPECTED: &str = "a list of integers";
    let value = object.get(key).unwrap_or(&Value::Null);
    let Value::Array(items) = value else {
        return Err(wrong(format, key.to_owned(), EXPECTED, value));
    };
    items
        .iter()
        .enumerate()
        .map(|(index, item)| item.as_i64().ok_or_else(|| wrong(format, format!("{key}[{index}]"), "an integer", item)))
        .collect()
}

fn keys(object: &Map<String, Value>) -> Keys {
    Keys(object.keys().cloned().collect())
}

fn wrong(format: FormatChoice, key: String, expected: &'static str, found: &Value) -> RowError {
    RowError::WrongType { format, key, expected, found: describe(found) }
}

/// A value as an error shows it: its kind, and the value itself where that is short.
fn describe(value: &Value) -> String {
    match value {
        Value::Number(number) => format!("the number {number}"),
        Value::Bool(boolean) => format!("the boolean {boolean}"),
        other => kind(other).to_owned(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: Option<Format>, line: &str) -> Result<(FormatChoice, Row), RowError> {
        let object = parse_object(line.as_bytes())?;
        let choice = match format {
            Some(format) => FormatChoice { format, detected: false },
            None => detect(&object)?,
        };
        Ok((choice, parse_row(choice, object, 100)?))
    }

    fn error(format: Option<Format>, line: &str) -> String {
        parse(format, line).unwrap_err().to_string()
    }

    #[track_caller]
    fn detects(format: Format, line: &str) {
        let (choice, _) = parse(None, line).unwrap();
        assert_eq!(choice, FormatChoice { format, detected: true });
    }

    #[test]
    fn the_first_row_decides_the_format_by_its_keys() {
        detects(Format::Chat, r#"{"id": 1, "messages": [{"role": "user", "content": "x"}]}"#);
        detects(Format::Prompt, r#"{"prompt": "p", "completion": "c"}"#);
        detects(Format::Alpaca, r#"{"instruction": "i", "input": "", "output": "o", "text": "all of it"}"#);
        detects(Format::Alpaca, r#"{"instruction": "i", "output": "o"}"#);
        detects(Format::Text, r#"{"text": "t"}"#);
        detects(Format::Tokens, r#"{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}"#);
    }

    #[test]
    fn unknown_keys_are_an_error_that_lists_what_is_known() {
        let error = error(None, r#"{"question": "q", "answer": "a"}"#);
        assert!(error.contains("`question`, `answer`") && error.contains("`messages` (chat)"), "{error}");
    }

    #[test]
    fn a_row_that_does_not_fit_names_the_key_and_what_was_found() {
        let missing = error(Some(Format::Prompt), r#"{"prompt": "p", "answer": "a"}"#);
        assert!(missing.contains("key `completion` is missing, found `prompt`, `answer`"), "{missing}");
        let wrong = error(Some(Format::Text), r#"{"text": 3}"#);
        assert!(wrong.contains("`text` must be a string, found the number 3"), "{wrong}");
        let role = error(Some(Format::Chat), r#"{"messages": [{"role": "user", "content": "x"}, {"from": "gpt"}]}"#);
        assert!(role.contains("messages[1]: a message needs a `role`"), "{role}");
        let empty = error(Some(Format::Chat), r#"{"messages": []}"#);
        assert!(empty.contains("found an empty list"), "{empty}");
        let tools = error(Some(Format::Chat), r#"{"messages": [{"role": "user", "content": "x"}], "tools": "[]"}"#);
        assert!(tools.contains("`tools` must be a list of tools, found a string"), "{tools}");
    }

    #[test]
    fn a_detected_format_says_so_when_a_later_row_does_not_fit() {
        let choice = FormatChoice { format: Format::Text, detected: true };
        let object = parse_object(br#"{"prompt": "p", "completion": "c"}"#).unwrap();
        let error = parse_row(choice, object, 100).unwrap_err().to_string();
        assert!(error.contains("`text` (chosen from the first row)"), "{error}");
    }

    #[test]
    fn lines_that_are_not_objects_say_what_they_are() {
        assert!(matches!(parse_object(b"{\"text\": \"\xff\"}"), Err(RowError::Utf8 { offset: 10 })));
        let broken = error(None, r#"{"text": }"#);
        assert!(broken.contains("not valid JSON") && broken.contains("column 10"), "{broken}");
        let array = error(None, r#"[{"text": "t"}]"#);
        assert!(array.contains("found a list") && array.contains("JSON Lines"), "{array}");
        let pretty = error(None, "{");
        assert!(pretty.contains("one whole object per line"), "{pretty}");
    }

    #[test]
    fn labels_must_be_unshifted_and_of_equal_length() {
        let (_, row) = parse(None, r#"{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}"#).unwrap();
        let Row::Tokens { ids, trained } = row else { panic!("{row:?}") };
        assert_eq!((ids, trained), (vec![5, 6, 7], vec![false, true, true]));
        let count = error(None, r#"{"input_ids": [5, 6], "labels": [5]}"#);
        assert!(count.contains("2 entries") && count.contains("has 1"), "{count}");
        let shifted = error(None, r#"{"input_ids": [5, 6], "labels": [6, -100]}"#);
        assert!(shifted.contains("labels[0] is 6") && shifted.contains("not shifted"), "{shifted}");
    }

    #[test]
    fn ids_outside_the_vocabulary_and_padded_rows_are_errors() {
        for id in ["100", "-1", "4294967297"] {
            let error = error(None, &format!(r#"{{"input_ids": [{id}], "labels": [-100]}}"#));
            assert!(error.contains(&format!("input_ids[0] is {id}")) && error.contains("100 entries"), "{error}");
        }
        assert!(error(None, r#"{"input_ids": [1.5], "labels": [-100]}"#).contains("input_ids[0]"));
        let padded = error(None, r#"{"input_ids": [1, 0], "labels": [1, -100], "attention_mask": [1, 0]}"#);
        assert!(padded.contains("attention_mask[1] is 0"), "{padded}");
    }
}
