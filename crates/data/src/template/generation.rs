//! `{% generation %}` blocks, which transformers adds to Jinja to say what the assistant wrote.
//!
//! The tags are rewritten into a filter block that puts a private-use character at each end of the block. Both forms
//! are block tags, so whitespace control, `trim_blocks` and `lstrip_blocks` act on them alike; the inner `with` gives
//! the block its own scope, as Jinja's call block has.

use std::ops::Range;

/// The filter that the rewritten tag calls.
pub(super) const FILTER: &str = "__generation__";
/// Where a generation block starts in marked text.
pub(super) const OPEN: char = '\u{10fff0}';
/// Where a generation block ends in marked text.
pub(super) const CLOSE: char = '\u{10fff1}';

/// The source with its generation tags rewritten, or `None` when it has none.
pub(super) fn rewrite(source: &str) -> Option<String> {
    let mut out = String::with_capacity(source.len() + 128);
    let mut found = false;
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|offset| at + offset) {
        out.push_str(&source[at..open]);
        let rest = &source[open..];
        let end = if rest.starts_with("{#") {
            find_from(source, open, "#}")
        } else if rest.starts_with("{{") {
            skip_expression(source, open + 2, "}}")
        } else if rest.starts_with("{%") {
            let end = skip_expression(source, open + 2, "%}");
            let tag = Tag::parse(&source[open..end]);
            match tag.name {
                "raw" => find_endraw(source, end),
                "generation" => {
                    found = true;
                    out.push_str(&format!("{{%{} filter {FILTER} %}}{{% with {}%}}", tag.before, tag.after));
                    at = end;
                    continue;
                }
                "endgeneration" => {
                    found = true;
                    out.push_str(&format!("{{%{} endwith %}}{{% endfilter {}%}}", tag.before, tag.after));
                    at = end;
                    continue;
                }
                _ => end,
            }
        } else {
            open + 1
        };
        out.push_str(&source[open..end]);
        at = end;
    }
    out.push_str(&source[at..]);
    found.then_some(out)
}

/// A block tag with its whitespace control.
struct Tag<'s> {
    before: &'s str,
    name: &'s str,
    after: &'s str,
}

impl<'s> Tag<'s> {
    /// Parses `{%- name … -%}`; the name is empty when more than the name stands in a generation tag.
    fn parse(tag: &'s str) -> Self {
        let inner = tag.strip_prefix("{%").unwrap_or(tag);
        let inner = inner.strip_suffix("%}").unwrap_or(inner);
        let (before, inner) = split_control_front(inner);
        let (inner, after) = split_control_back(inner);
        let name = inner.trim();
        Self { before, name, after }
    }
}

fn split_control_front(inner: &str) -> (&str, &str) {
    let length = usize::from(inner.starts_with(['-', '+']));
    inner.split_at(length)
}

fn split_control_back(inner: &str) -> (&str, &str) {
    let length = usize::from(inner.ends_with(['-', '+']));
    inner.split_at(inner.len() - length)
}

fn find_from(source: &str, from: usize, needle: &str) -> usize {
    source[from..].find(needle).map_or(source.len(), |offset| from + offset + needle.len())
}

/// The end of a tag or expression; its delimiter does not count within a string or brackets.
fn skip_expression(source: &str, from: usize, end: &str) -> usize {
    let bytes = source.as_bytes();
    let mut depth = 0_usize;
    let mut at = from;
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'\'' | b'"') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            _ if depth == 0 && bytes[at..].starts_with(end.as_bytes()) => return at + end.len(),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    source.len()
}

/// The end of the `endraw` tag that closes a raw block whose body starts at `from`.
fn find_endraw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(open) = source[at..].find("{%").map(|offset| at + offset) {
        let end = find_from(source, open, "%}");
        if Tag::parse(&source[open..end]).name == "endraw" {
            return end;
        }
        at = open + 2;
    }
    source.len()
}

/// Takes the block marks out of rendered text: the text as transformers renders it, and the blocks as byte ranges.
/// Nested blocks count once; `None` when a filter of the template has separated a mark from its partner.
pub(super) fn take_blocks(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let mut blocks = Vec::new();
    let mut starts = Vec::new();
    for c in marked.chars() {
        match c {
            OPEN => starts.push(text.len()),
            CLOSE => {
                let start = starts.pop()?;
                if starts.is_empty() {
                    blocks.push(start..text.len());
                }
            }
            c => text.push(c),
        }
    }
    starts.is_empty().then_some((text, blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_control_moves_to_the_outside() {
        assert_eq!(
            rewrite("a {%- generation +%} b {%endgeneration-%} c").unwrap(),
            "a {%- filter __generation__ %}{% with +%} b {% endwith %}{% endfilter -%} c"
        );
    }

    #[test]
    fn comments_strings_and_raw_blocks_are_left_alone() {
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ {'a': {'b': '}}{% generation %}'}} }}",
            "{% if x == '%}{% generation %}' %}{% endif %}",
            "{% raw %}{% generation %}{% endraw %}",
            "{ % generation % }",
        ] {
            assert_eq!(rewrite(source), None, "{source}");
        }
    }

    #[test]
    fn blocks_nest_and_must_balance() {
        let marked = format!("a{OPEN}é{OPEN}b{CLOSE}{CLOSE}c{OPEN}{CLOSE}");
        assert_eq!(take_blocks(&marked), Some(("aébc".into(), vec![1..4, 5..5])));
        assert_eq!(take_blocks(&format!("{CLOSE}{OPEN}")), None);
    }
}
