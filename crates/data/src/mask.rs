//! From trained bytes of a text to trained tokens.
//!
//! A token is trained when any of its bytes lies in a trained span: the rule that transformers follows for its
//! assistant mask (`char_to_token` of the first and of the last character, and everything between). Spans end at
//! template markers, so a token seldom crosses a border. One that does may reach outside over white space only, as
//! when a tokenizer joins the space of a header with the first word, or a marker takes the line break after it. Where
//! a marker of the template takes white space of the answer (`rstrip` tokens), it stays the template's, other than in
//! transformers. In any other case the token would teach or hide a piece of the template, and the row is refused.

use std::ops::Range;

use crate::template::{Rendered, TemplateError};
use crate::tokenizer::Encoding;

/// Why tokens and spans do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// A token covers trained text and text of the template.
    #[error(
        "token {index} is {token:?}, of which only {trained:?} is trained: the tokenizer joins the template's text with the answer"
    )]
    Straddles {
        /// Which token.
        index: usize,
        /// The text that it covers.
        token: String,
        /// The part of it that is trained.
        trained: String,
    },
    /// Trained text that no token covers.
    #[error("no token covers the trained text {text:?}: the tokenizer drops it")]
    Uncovered {
        /// The text.
        text: String,
    },
    /// A token's range or a span does not lie within the text.
    #[error("the byte range {start}..{end} does not lie on character borders of the text")]
    OutOfRange {
        /// First byte.
        start: usize,
        /// Byte after the last.
        end: usize,
    },
}

/// Marks the tokens of a rendered conversation that are trained; `encoding` must come from its text.
///
/// # Errors
/// See [`trained_in_spans`].
pub fn trained_tokens(encoding: &Encoding, rendered: &Rendered) -> Result<Vec<bool>, TemplateError> {
    Ok(trained_in_spans(&rendered.text, &encoding.offsets, &rendered.spans)?)
}

/// Marks the tokens that are trained.
///
/// `offsets` are byte ranges of `text` in ascending order, `spans` the trained byte ranges. A span that covers the
/// whole text trains every token, also one without bytes of its own.
///
/// # Errors
/// When a token crosses the border of a span with more than white space, or trained text has no token.
pub fn trained_in_spans(text: &str, offsets: &[Range<usize>], spans: &[Range<usize>]) -> Result<Vec<bool>, MaskError> {
    let mut trained = vec![false; offsets.len()];
    for span in merge(spans) {
        let covered = slice(text, &span)?;
        if span == (0..text.len()) {
            trained.fill(true);
            continue;
        }
        let touches = |range: &Range<usize>| range.start < span.end && range.end > span.start;
        let first = offsets.iter().position(touches);
        let last = offsets.iter().rposition(touches);
        let (Some(first), Some(last)) = (first, last) else {
            if covered.trim().is_empty() {
                continue;
            }
            return Err(MaskError::Uncovered { text: covered.to_owned() });
        };
        for index in first..=last {
            let range = &offsets[index];
            if !touches(range) {
                trained[index] = true;
                continue;
            }
            let inside = range.start.max(span.start)..range.end.min(span.end);
            let before = slice(text, &(range.start..inside.start))?;
            let after = slice(text, &(inside.end..range.end))?;
            if !(before.trim().is_empty() && after.trim().is_empty()) {
                if slice(text, &inside)?.trim().is_empty() {
                    continue;
                }
                return Err(MaskError::Straddles {
                    index,
                    token: slice(text, range)?.to_owned(),
                    trained: slice(text, &inside)?.to_owned(),
                });
            }
            trained[index] = true;
        }
    }
    Ok(trained)
}

fn slice<'t>(text: &'t str, range: &Range<usize>) -> Result<&'t str, MaskError> {
    text.get(range.clone()).ok_or(MaskError::OutOfRange { start: range.start, end: range.end })
}

/// The spans in ascending order, those that touch joined, empty ones left out.
fn merge(spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut sorted: Vec<_> = spans.iter().filter(|span| !span.is_empty()).cloned().collect();
    sorted.sort_by_key(|span| span.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(sorted.len());
    for span in sorted {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, lengths: &[usize], spans: &[(usize, usize)], expected: Result<&str, &str>) {
        let mut at = 0;
        let offsets: Vec<_> = lengths
            .iter()
            .map(|length| {
                at += length;
                at - length..at
            })
            .collect();
        let spans: Vec<_> = spans.iter().map(|&(start, end)| start..end).collect();
        let found = trained_in_spans(text, &offsets, &spans).map_err(|error| error.to_string());
        let found = found.map(|trained| trained.iter().map(|&t| if t { '1' } else { '0' }).collect::<String>());
        assert_eq!(found.as_deref().map_err(String::as_str), expected, "{text:?}");
    }

    #[test]
    fn a_token_is_trained_when_it_touches_a_span() {
        check("ab cd</s>", &[2, 3, 4], &[(3, 9)], Ok("011"));
        check("ab cd</s>", &[2, 3, 4], &[], Ok("000"));
        check("ab cd</s>", &[2, 1, 2, 4], &[(0, 1), (1, 2), (5, 5)], Ok("1000"));
    }

    #[test]
    fn a_span_of_the_whole_text_trains_tokens_without_bytes_too() {
        check("ab cd</s>", &[0, 2, 3, 4], &[(0, 9)], Ok("1111"));
        check("ab cd</s>", &[0, 2, 3, 4], &[(0, 5)], Ok("0110"));
    }

    #[test]
    fn borders_may_be_crossed_over_white_space_only() {
        check("x\nab<e>\n", &[1, 3, 4], &[(2, 7)], Ok("011"));
        check("<a>\n ab<e>", &[5, 2, 3], &[(4, 10)], Ok("011"));
        check(
            "x:ab<e>\n",
            &[1, 3, 4],
            &[(2, 7)],
            Err(
                "token 1 is \":ab\", of which only \"ab\" is trained: the tokenizer joins the template's text with the answer",
            ),
        );
    }

    #[test]
    fn dropped_text_is_an_error_and_dropped_white_space_is_not() {
        check("a b", &[1], &[(1, 2)], Ok("0"));
        check("a b", &[1], &[(2, 3)], Err("no token covers the trained text \"b\": the tokenizer drops it"));
        check("é", &[2], &[(1, 2)], Err("the byte range 1..2 does not lie on character borders of the text"));
    }
}
