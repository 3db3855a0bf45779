//! Rendering and loss masks against transformers (`tests/fixtures/chat`, made by the script that stands there).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use emberlora_config::{ChatTemplateChoice, LossOn};
use emberlora_data::{ChatTemplate, Conversation, RenderOptions, TemplateError, Tokenizer, mask};
use serde::Deserialize;

/// What transformers says about a conversation under a template.
#[derive(Deserialize)]
struct Golden {
    refused: Option<String>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    mask: String,
    /// What the generation prompt adds to the text, or else the whole text with it.
    prompt: Option<String>,
    prompted: Option<String>,
    ids: Option<Vec<u32>>,
}

/// Rows whose spans a template without `{% generation %}` does not give away, and what the refusal says.
const REFUSED: &[(&str, &str, &str)] =
    &[("llama3_always_prompt", "tool_call_null_content", "no generation prompt shows where the turn starts")];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat")
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> BTreeMap<String, T> {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(&fixtures().join("tokenizer")).unwrap()
}

fn template(tokenizer: &Tokenizer, name: &str) -> ChatTemplate {
    let path = fixtures().join("templates").join(format!("{name}.jinja"));
    tokenizer.chat_template(&ChatTemplateChoice::File(path)).unwrap().unwrap()
}

/// Calls `f` for every template and conversation, with the golden of the two.
fn for_each_golden(mut f: impl FnMut(&Tokenizer, &str, &str, &Conversation, &Golden)) {
    let tokenizer = tokenizer();
    let conversations: BTreeMap<String, Conversation> = read("conversations.json");
    let goldens: BTreeMap<String, BTreeMap<String, Golden>> = read("goldens.json");
    assert_eq!(goldens.len(), 17);
    for (template, goldens) in &goldens {
        assert_eq!(goldens.len(), conversations.len());
        for (name, golden) in goldens {
            f(&tokenizer, template, name, &conversations[name], golden);
        }
    }
}

fn mask_of(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    conversation: &Conversation,
    loss_on: LossOn,
) -> Result<String, TemplateError> {
    let rendered = template.render_with_spans(conversation, loss_on)?;
    let encoding = tokenizer.encode(&rendered.text, false).unwrap();
    let trained = mask::trained_tokens(&encoding, &rendered)?;
    Ok(trained.iter().map(|&trained| if trained { '1' } else { '0' }).collect())
}

#[test]
fn text_is_the_one_of_transformers() {
    for_each_golden(|tokenizer, name, conversation_name, conversation, golden| {
        let at = format!("{name} / {conversation_name}");
        for name in [name.to_owned(), format!("{name}.generation")] {
            let template = template(tokenizer, &name);
            let text = template.render(conversation, &RenderOptions::default());
            if let Some(refused) = &golden.refused {
                let error = text.expect_err(&at).to_string();
                // Python words a missing field in its own way.
                if !refused.contains("has no attribute") {
                    assert!(error.contains(refused.as_str()), "{at}: {error}\n{refused}");
                }
                continue;
            }
            assert_eq!(text.unwrap(), golden.text, "{at}");
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let prompted = match (&golden.prompt, &golden.prompted) {
                (Some(prompt), _) => format!("{}{prompt}", golden.text),
                (None, prompted) => prompted.clone().unwrap(),
            };
            assert_eq!(template.render(conversation, &options).unwrap(), prompted, "{at}");
        }
        if let Some(ids) = &golden.ids {
            assert_eq!(&tokenizer.encode(&golden.text, false).unwrap().ids, ids, "{at}");
        }
    });
}

#[test]
fn mask_of_a_template_with_generation_blocks_is_the_one_of_transformers() {
    for_each_golden(|tokenizer, name, conversation_name, conversation, golden| {
        if golden.refused.is_none() {
            let template = template(tokenizer, &format!("{name}.generation"));
            let mask = mask_of(tokenizer, &template, conversation, LossOn::Assistant).unwrap();
            assert_eq!(mask, golden.mask, "{name} / {conversation_name}\n{}", golden.text);
        }
    });
}

#[test]
fn mask_of_a_template_without_generation_blocks_is_the_one_of_its_twin_with_them() {
    let mut checked = 0;
    let mut wrong = Vec::new();
    for_each_golden(|tokenizer, name, conversation_name, conversation, golden| {
        if golden.refused.is_some() {
            return;
        }
        let expected = REFUSED.iter().find(|(template, conversation, _)| {
            (*template == name || *template == "*") && *conversation == conversation_name
        });
        let found = mask_of(tokenizer, &template(tokenizer, name), conversation, LossOn::Assistant);
        match (found, expected) {
            (Ok(mask), None) if mask == golden.mask => checked += 1,
            (Err(error), Some((_, _, reason))) if error.to_string().contains(reason) => {}
            (found, _) => wrong.push(format!(
                "{name} / {conversation_name}: {:?}\n{:?}\n{}\n{}",
                found.as_ref().err().map(ToString::to_string),
                golden.text,
                found.as_deref().unwrap_or(""),
                golden.mask
            )),
        }
    });
    assert!(wrong.is_empty(), "{} wrong, {checked} right\n{}", wrong.len(), wrong.join("\n"));
    assert!(checked > 450, "{checked}");
}
