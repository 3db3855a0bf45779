//! Private-use characters that travel through a template with the text of a conversation and show where it went.
//!
//! *Marks* stand at the two ends of a message's content, inside its white space, so that trimming acts as before.
//! *Stand-ins* take the place of texts in the conversation that look like the template's own markers, so that every
//! marker left in the rendering was written by the template. Both are trusted only when taking them out again gives
//! the text that the template renders without them.

use serde_json::Value as Json;

use super::python::is_space;
use crate::{Conversation, Message};

const FIRST_MARK: u32 = 0x10_0000;
const FIRST_STAND_IN: u32 = 0x10_8000;
/// The contents of the messages that probe a template.
pub(super) const PROBES: [&str; 3] = ["\u{10f000}", "\u{10f001}", "\u{10f002}"];

/// Which contents are marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Marking {
    /// Both ends of every content, also of an empty one.
    All,
    /// Both ends of contents that are not empty.
    NotEmpty,
    /// The end of contents that are not empty, for templates that look at how a content begins.
    Ends,
    /// None.
    Nothing,
}

/// From most to least informative.
pub(super) const MARKINGS: [Marking; 4] = [Marking::All, Marking::NotEmpty, Marking::Ends, Marking::Nothing];

/// Whether a text already has characters of the range that marks are taken from.
pub(super) fn is_reserved(c: char) -> bool {
    c as u32 >= FIRST_MARK
}

/// How many messages can be marked.
pub(super) const MAX_MESSAGES: usize = ((FIRST_STAND_IN - FIRST_MARK) / 2) as usize;

fn mark(message: usize, end: bool) -> char {
    char::from_u32(FIRST_MARK + 2 * message as u32 + u32::from(end)).unwrap_or('\u{10fffd}')
}

fn stand_in(index: usize) -> char {
    char::from_u32(FIRST_STAND_IN + index as u32).unwrap_or('\u{10fffd}')
}

/// Applies a function to every text of a conversation but the roles.
pub(super) fn for_each_text(conversation: &mut Conversation, mut f: impl FnMut(&mut String)) {
    fn walk(value: &mut Json, f: &mut impl FnMut(&mut String)) {
        match value {
            Json::String(text) => f(text),
            Json::Array(items) => items.iter_mut().for_each(|item| walk(item, f)),
            Json::Object(fields) => fields.values_mut().for_each(|item| walk(item, f)),
            Json::Null | Json::Bool(_) | Json::Number(_) => {}
        }
    }
    for message in &mut conversation.messages {
        for (key, value) in message.fields_mut() {
            if key != "role" {
                walk(value, &mut f);
            }
        }
    }
    if let Some(tools) = &mut conversation.tools {
        walk(tools, &mut f);
    }
}

/// Puts stand-ins for every occurrence of `markers`, longest first, and says whether there were any.
pub(super) fn put_stand_ins(conversation: &mut Conversation, markers: &[String]) -> bool {
    let mut found = false;
    for_each_text(conversation, |text| {
        for (index, marker) in markers.iter().enumerate() {
            if text.contains(marker.as_str()) {
                *text = text.replace(marker.as_str(), stand_in(index).encode_utf8(&mut [0; 4]));
                found = true;
            }
        }
    });
    found
}

/// What a stand-in stands for.
fn stands_for(c: char, markers: &[String]) -> Option<&str> {
    let index = (c as u32).checked_sub(FIRST_STAND_IN)?;
    markers.get(index as usize).map(String::as_str)
}

/// A text with its stand-ins replaced by what they stand for.
pub(super) fn restore(text: &str, markers: &[String]) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match stands_for(c, markers) {
            Some(marker) => out.push_str(marker),
            None => out.push(c),
        }
    }
    out
}

/// Where a byte of a text with stand-ins is in the restored text.
pub(super) fn restored_offset(text: &str, offset: usize, markers: &[String]) -> usize {
    let before = text[..offset].chars();
    before.map(|c| stands_for(c, markers).map_or(c.len_utf8(), str::len)).sum()
}

/// The text at the front of a message's content, or at its back: the content itself or a text part of it.
pub(super) fn content_text(message: &mut Message, back: bool) -> Option<&mut String> {
    match message.fields_mut().get_mut("content")? {
        Json::String(text) => Some(text),
        Json::Array(parts) => {
            let mut texts = parts.iter_mut().filter_map(|part| match part.get_mut("text") {
                Some(Json::String(text)) => Some(text),
                _ => None,
            });
            if back { texts.next_back() } else { texts.next() }
        }
        _ => None,
    }
}

/// Puts marks at the ends of a message's content.
pub(super) fn put_marks(message: &mut Message, index: usize, marking: Marking) {
    let sides: &[bool] = match marking {
        Marking::All | Marking::NotEmpty => &[true, false],
        Marking::Ends => &[true],
        Marking::Nothing => &[],
    };
    for &back in sides {
        let Some(text) = content_text(message, back) else { continue };
        let core_is_empty = text.chars().all(|c| is_space(c) || is_reserved(c));
        if core_is_empty && marking != Marking::All {
            continue;
        }
        let at = if back {
            text.trim_end_matches(is_space).len()
        } else {
            text.len() - text.trim_start_matches(is_space).len()
        };
        // The marks of an empty content stand together, the one for the front first.
        text.insert(if core_is_empty && back { text.len() } else { at }, mark(index, back));
    }
}

/// Where the marks were in a rendering, and the rendering without them.
#[derive(Debug, Clone, Default)]
pub(super) struct Unmarked {
    pub(super) text: String,
    /// For each message where its content begins, but for white space.
    pub(super) fronts: Vec<Option<usize>>,
    /// For each message where its content ends, but for white space.
    pub(super) backs: Vec<Option<usize>>,
    /// Messages whose content the template wrote more than once.
    pub(super) repeated: Vec<usize>,
}

impl Unmarked {
    pub(super) fn new(marked: &str, messages: usize) -> Self {
        let mut found = Self {
            text: String::with_capacity(marked.len()),
            fronts: vec![None; messages],
            backs: vec![None; messages],
            repeated: Vec::new(),
        };
        for c in marked.chars() {
            let Some(number) = (c as u32).checked_sub(FIRST_MARK).filter(|_| (c as u32) < FIRST_STAND_IN) else {
                found.text.push(c);
                continue;
            };
            let message = number as usize / 2;
            let place = if number % 2 == 0 { &mut found.fronts } else { &mut found.backs };
            if let Some(place) = place.get_mut(message)
                && place.replace(found.text.len()).is_some()
            {
                found.repeated.push(message);
            }
        }
        found
    }
}
