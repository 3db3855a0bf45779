//! Which text is trained: by template, by `loss_on`, and in the cases that are meant to mislead.

use std::path::Path;

use emberlora_config::{ChatTemplateChoice, LossOn};
use emberlora_data::{ChatTemplate, Conversation, RenderOptions, TemplateError, Tokenizer, mask};
use proptest::prelude::*;
use serde_json::{Value, json};

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                      {% endif %}";

fn tokenizer() -> Tokenizer {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat");
    Tokenizer::from_dir(&fixtures.join("tokenizer")).unwrap()
}

fn conversation(messages: Value) -> Conversation {
    serde_json::from_value(json!({ "messages": messages })).unwrap()
}

/// A conversation whose turns alternate, beginning with the user.
fn turns(contents: &[&str]) -> Conversation {
    let message = |(content, role): (&&str, &str)| json!({ "role": role, "content": content });
    conversation(contents.iter().zip(["user", "assistant"].into_iter().cycle()).map(message).collect())
}

fn trained(template: &str, conversation: &Conversation, loss_on: LossOn) -> Result<Vec<String>, String> {
    let template = ChatTemplate::new("test", template, &tokenizer()).unwrap();
    let rendered = template.render_with_spans(conversation, loss_on).map_err(|error| error.to_string())?;
    Ok(rendered.spans.iter().map(|span| rendered.text[span.clone()].to_owned()).collect())
}

#[track_caller]
fn check(template: &str, conversation: &Conversation, expected: &[&str]) {
    assert_eq!(trained(template, conversation, LossOn::Assistant).unwrap(), expected);
}

#[track_caller]
fn check_refused(template: &str, conversation: &Conversation, reason: &str) {
    let found = trained(template, conversation, LossOn::Assistant);
    assert!(found.as_ref().is_err_and(|error| error.contains(reason)), "{found:?}");
}

#[test]
fn loss_on_chooses_the_turns() {
    let row = turns(&["a", "b", "c", "d", "e"]);
    check(CHATML, &row, &["b<|im_end|>", "d<|im_end|>"]);
    assert_eq!(trained(CHATML, &row, LossOn::LastAssistant).unwrap(), ["d<|im_end|>"]);
    let all = trained(CHATML, &row, LossOn::All).unwrap();
    assert!(all.len() == 1 && all[0].starts_with("<|im_start|>user\na") && all[0].ends_with("e<|im_end|>\n"));
    assert!(trained(CHATML, &turns(&["a"]), LossOn::Assistant).unwrap().is_empty());
}

#[test]
fn loss_on_the_last_turn_does_not_ask_what_earlier_turns_do() {
    let template =
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}";
    check_refused(template, &turns(&["a", "b", "c", "d"]), "so there is no one end of turn");
    let generation = "{% for m in messages %}{% generation %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}\
                      {% endgeneration %}{% endfor %}";
    let row = turns(&["a", "b", "c", "d"]);
    assert_eq!(trained(generation, &row, LossOn::Assistant).unwrap().concat(), "bd");
    assert_eq!(trained(generation, &row, LossOn::LastAssistant).unwrap().concat(), "d");
}

#[test]
fn white_space_is_trained_as_far_as_the_template_writes_it() {
    let row = turns(&[" a ", "\n b \n", "c\n", " "]);
    check(CHATML, &row, &["\n b \n<|im_end|>", " <|im_end|>"]);
    let trims = CHATML.replace("message['content']", "message['content'] | trim");
    check(&trims, &row, &["b<|im_end|>", "<|im_end|>"]);
    let unprompted = CHATML.split("{% if add").next().unwrap();
    check(unprompted, &row, &["\n b \n<|im_end|>", " <|im_end|>"]);
    check(
        &unprompted.replace("message['content']", "message['content'].lstrip()"),
        &row,
        &["b \n<|im_end|>", "<|im_end|>"],
    );
}

#[test]
fn markers_in_a_message_are_text() {
    let fake = "x<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n";
    check(CHATML, &turns(&[fake, "b"]), &["b<|im_end|>"]);
    check(CHATML, &turns(&[fake, fake, "c", "d"]), &[&format!("{fake}<|im_end|>"), "d<|im_end|>"]);
    check(CHATML, &turns(&["<|im_start|>assistant\n", "<|im_end|>"]), &["<|im_end|><|im_end|>"]);
    let trims = CHATML.replace("message['content']", "message['content'] | trim");
    check(&trims, &turns(&["<|im_start|>assistant\n", "b<|im_end|>\n"]), &["b<|im_end|><|im_end|>"]);
}

#[test]
fn a_template_that_decides_by_markers_in_a_message_is_refused() {
    let looks = CHATML
        .replace("message['content'] + ", "('END' if '<|im_end|>' in message['content'] else message['content']) + ");
    check(&looks, &turns(&["a", "b"]), &["b<|im_end|>"]);
    check_refused(&looks, &turns(&["a <|im_end|>", "b"]), "contains the template's own markers");
}

#[test]
fn a_template_without_end_of_turn_trains_the_content() {
    let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}";
    check(template, &turns(&["a", "b ", "c", " d"]), &["b ", " d"]);
    let prompted = format!("{template}{{% if add_generation_prompt %}}{{{{ 'assistant: ' }}}}{{% endif %}}");
    check(&prompted, &turns(&["a", "b ", "c", " d"]), &["b ", " d"]);
}

#[test]
fn an_end_of_turn_that_the_tokenizer_does_not_know_is_still_one() {
    let template = CHATML.replace("im_end", "unknown_end").replace("im_start", "unknown_start");
    check(&template, &turns(&["<|unknown_end|>", "b"]), &["b<|unknown_end|>"]);
}

#[test]
fn a_generation_prompt_without_the_role_does_not_make_the_role_trained() {
    let template = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>' }}");
    check(&template, &turns(&["a", "b"]), &["b<|im_end|>"]);
    let eos_only = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{% else %}{{ eos_token }}");
    check(&eos_only, &turns(&["a", "b", "c", "d"]), &["b<|im_end|>", "d<|im_end|>"]);
}

#[test]
fn what_the_template_writes_into_a_turn_is_part_of_it() {
    let thinks = CHATML.replace(
        "message['content'] +",
        "('<think></think>' if message.role == 'assistant' else '') + message['content'] +",
    );
    check(&thinks, &turns(&["a", "b", "c", ""]), &["<think></think>b<|im_end|>", "<think></think><|im_end|>"]);
}

#[test]
fn content_that_a_template_repeats_or_drops_is_refused_or_left_out() {
    let twice = CHATML.replace("message['content'] +", "message['content'] + message['content'] +");
    check_refused(&twice, &turns(&["a", "b"]), "does not write each content once");
    let first_only = "{% for m in messages[:2] %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}\
                      {% if add_generation_prompt %}assistant:{% endif %}";
    check_refused(first_only, &turns(&["a", "b", "c", "d"]), "does not write each content once");
    let no_empty =
        CHATML.replace("{{'<|im", "{% if message.content %}{{'<|im").replace("{% endfor", "{% endif %}{% endfor");
    check(&no_empty, &turns(&["a", "b", "c", "d"]), &["b<|im_end|>", "d<|im_end|>"]);
    check_refused(&no_empty, &turns(&["a", "", "c", "d"]), "messages[1]");
}

#[test]
fn lists_of_parts_are_read_by_templates_that_do() {
    let parts = conversation(json!([
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
        { "role": "assistant", "content": [{ "type": "text", "text": " c" }, { "type": "text", "text": "d " }] },
    ]));
    let reads = CHATML.replace(
        "message['content'] +",
        "(message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join) +",
    );
    check(&reads, &parts, &[" cd <|im_end|>"]);
    check_refused(CHATML, &parts, "fails on this conversation");
    let prints = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ':' }}{{ m.content }}<|im_end|>{% endfor %}";
    check_refused(prints, &parts, "messages[0].content is a list of parts, which the template test prints as it is");
}

#[test]
fn text_that_marks_are_taken_from_is_refused() {
    check_refused(CHATML, &turns(&["a", "b\u{100000}"]), "private-use plane 16");
}

#[test]
fn an_empty_conversation_is_an_error() {
    assert_eq!(trained(CHATML, &turns(&[]), LossOn::All), Err("the conversation has no messages".into()));
}

#[test]
fn generation_blocks_decide_themselves() {
    let header_too =
        "{% for m in messages %}\n{%- generation -%}\n  {{ m.content }}\n{%- endgeneration +%}\n!{% endfor %}";
    check(header_too, &turns(&["a", "b"]), &["a", "b"]);
    let apart = "{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x[:1] }}";
    check_refused(apart, &turns(&["a", "b"]), "takes its {% generation %} blocks apart");
    let scoped = "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}";
    check(scoped, &turns(&["a"]), &[]);
    let template = ChatTemplate::new("test", scoped, &tokenizer()).unwrap();
    assert_eq!(template.render(&turns(&["a"]), &RenderOptions::default()).unwrap(), "21");
}

fn preset(choice: &ChatTemplateChoice) -> (Tokenizer, ChatTemplate) {
    let tokenizer = tokenizer();
    let template = tokenizer.chat_template(choice).unwrap().unwrap();
    (tokenizer, template)
}

#[test]
fn presets_train_contents_with_their_end_of_turn() {
    for (choice, end) in [
        (ChatTemplateChoice::Chatml, "<|im_end|>"),
        (ChatTemplateChoice::Tulu, "</s>"),
        (ChatTemplateChoice::Llama3, "<|eot_id|>"),
        (ChatTemplateChoice::Zephyr, "</s>"),
    ] {
        let (_, template) = preset(&choice);
        let rendered = template.render_with_spans(&turns(&["a", "b", "c", ""]), LossOn::Assistant).unwrap();
        let texts: Vec<_> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(texts, [&format!("b{end}"), end], "{choice:?}");
    }
}

/// Pieces that contents are made of: words, white space, markers, and scripts that take several tokens a character.
fn content() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "a",
        "word",
        " ",
        "\n",
        "\n\n",
        "\t",
        "assistant",
        "user",
        "<|im_end|>",
        "<|im_start|>",
        "</s>",
        "<s>",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "[INST]",
        "[/INST]",
        "<end_of_turn>",
        "<|end|>",
        "<think>",
        "</think>",
        "ASSISTANT:",
        "é",
        "e\u{301}",
        "你好",
        "🙂",
        "\u{a0}",
        "{{ x }}",
        "'",
        "\"",
        "\\",
        "<|im_",
        "end|>",
        "<｜Assistant｜>",
    ]);
    prop::collection::vec(pieces, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A template and its twin with generation blocks agree on every conversation, or the row is refused.
    #[test]
    fn spans_found_by_rendering_are_those_of_generation_blocks(
        system in prop::option::of(content()),
        contents in prop::collection::vec(content(), 1..7),
    ) {
        let mut row = turns(&contents.iter().map(String::as_str).collect::<Vec<_>>());
        if let Some(system) = system {
            row.messages.insert(0, emberlora_data::Message::new("system", system));
        }
        let tokenizer = tokenizer();
        let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat/templates");
        for name in ["chatml", "chatml_no_prompt", "llama3", "zephyr", "tulu", "mistral", "llama2", "gemma", "phi3", "vicuna", "qwen3", "deepseek_r1"] {
            let load = |name: &str| {
                let choice = ChatTemplateChoice::File(templates.join(format!("{name}.jinja")));
                tokenizer.chat_template(&choice).unwrap().unwrap()
            };
            let twin = load(&format!("{name}.generation")).render_with_spans(&row, LossOn::Assistant);
            let found = load(name).render_with_spans(&row, LossOn::Assistant);
            let Ok(twin) = twin else {
                prop_assert!(matches!(found, Err(TemplateError::Render { .. })), "{}: {:?}", name, found);
                continue;
            };
            let found = match found {
                Err(TemplateError::Spans(_)) => continue,
                found => found.unwrap(),
            };
            prop_assert_eq!(&found.text, &twin.text);
            let encoding = tokenizer.encode(&found.text, false).unwrap();
            let masks = (mask::trained_tokens(&encoding, &twin), mask::trained_tokens(&encoding, &found));
            let (Ok(twin_mask), Ok(mask)) = masks else { continue };
            prop_assert_eq!(mask, twin_mask, "{}: {:?}", name, found.text);
        }
    }
}
