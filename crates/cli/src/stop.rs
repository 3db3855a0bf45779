//! Where what the model writes ends.

use emberlora_config::LossOn;
use emberlora_data::{ChatTemplate, Conversation, Message, Tokenizer};
use emberlora_model::{ConfigError, stop_tokens};
use emberlora_train::Base;

/// The tokens that end a text: those that the model's configuration lists, the one that ends a sequence for the
/// tokenizer and, where a template is in use, the one that ends a turn.
pub(crate) fn tokens(base: &Base, template: Option<&ChatTemplate>) -> Result<Vec<u32>, ConfigError> {
    let mut tokens = stop_tokens(&base.dir)?;
    tokens.extend(base.tokenizer.eos_id());
    tokens.extend(template.and_then(|template| end_of_turn(template, &base.tokenizer)));
    Ok(tokens)
}

/// The token that ends an assistant's turn, where the template ends it with one token. A model that was trained on this
/// template writes it, whatever its configuration lists.
fn end_of_turn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    const ANSWER: &str = "answer";
    let turns = vec![Message::new("user", "question"), Message::new("assistant", ANSWER)];
    let rendered = template.render_with_spans(&Conversation::new(turns, None), LossOn::Assistant).ok()?;
    let turn = rendered.text.get(rendered.spans.last()?.clone())?;
    tokenizer.token_to_id(turn.rsplit_once(ANSWER)?.1.trim())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_template_adds_the_token_that_ends_its_turns() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/model");
        let base = Base { tokenizer: Tokenizer::from_dir(&dir).unwrap(), dir, commit: None };
        let [end_of_sequence, other] = ["<|im_end|>", "<|endoftext|>"].map(|token| base.tokenizer.token_to_id(token));
        // Once from config.json, once from the tokenizer.
        assert_eq!(tokens(&base, None).unwrap(), [end_of_sequence.unwrap(); 2]);
        let source = "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}\
                      <|endoftext|>{{ '\n' }}{% endfor %}";
        let template = ChatTemplate::new("other", source, &base.tokenizer).unwrap();
        assert_eq!(tokens(&base, Some(&template)).unwrap().last(), other.as_ref());
    }
}
