//! Which bytes of a rendered conversation the assistant wrote.
//!
//! The template is a black box, so the answer comes from renderings of it, and is given only when they agree:
//!
//! 1. A probe (user, assistant, user with unique contents) shows the header that `add_generation_prompt` writes and
//!    the text that ends an assistant's turn: the first token of the tokenizer's added vocabulary that follows the
//!    content in a last turn as in an earlier one, or, without such a token, what is written there but white space.
//! 2. The conversation is rendered with marks at the ends of every content and stand-ins for contents that look like
//!    those markers (module `marks`). Without them it must be the plain rendering to the byte. Now every
//!    marker in the text is the template's own, and the place of every content is known.
//! 3. A turn starts after the header, if only the content's own white space lies between the two; else where the
//!    messages before it, rendered with the generation prompt, end, if that is a prefix of the text and leaves the
//!    whole content to the turn; else (templates that render history differently) after the header that was written
//!    last before the content. Without a generation prompt it starts where the content starts. It ends after the first end-of-turn marker behind the content, which must
//!    come before the next message.
//!
//! Whatever fails any of this is refused with the reason.

use std::ops::Range;

use emberlora_config::LossOn;
use minijinja::value::Serde;

use super::generation::take_blocks;
use super::marks::{self, MARKINGS, Marking, PROBES, Unmarked};
use super::python::is_space;
use super::{Compiled, REASONING, RenderOptions, Rendered, TemplateError};
use crate::{Conversation, Message};

/// How a template frames an assistant's turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TurnShape {
    /// What `add_generation_prompt` adds, unless that leaves the role to the model.
    header: Option<String>,
    /// What ends a turn; `None` when nothing does.
    end: Option<String>,
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, TemplateError> {
    Err(TemplateError::Spans(reason.into()))
}

/// The text of a template with generation blocks, without their marks.
pub(super) fn without_blocks(marked: &str) -> Result<String, TemplateError> {
    blocks_of(marked).map(|(text, _)| text)
}

fn blocks_of(marked: &str) -> Result<(String, Vec<Range<usize>>), TemplateError> {
    match take_blocks(marked) {
        Some(found) => Ok(found),
        None => refuse("the template takes its {% generation %} blocks apart after writing them"),
    }
}

impl Compiled {
    pub(super) fn render_with_spans(
        &self,
        conversation: &Conversation,
        loss_on: LossOn,
    ) -> Result<Rendered, TemplateError> {
        let marked = self.plain(conversation, conversation.messages.len(), false)?;
        let (text, blocks) = if self.has_generation { blocks_of(&marked)? } else { (marked, Vec::new()) };
        self.check_content(conversation, &text)?;
        let last = conversation.messages.iter().rposition(|message| message.role() == "assistant");
        let spans = match (loss_on, last) {
            (LossOn::All, _) => std::iter::once(0..text.len()).collect(),
            (_, None) => Vec::new(),
            (LossOn::Assistant, Some(_)) if self.has_generation => blocks,
            (LossOn::LastAssistant, Some(last)) if self.has_generation => {
                let earlier = self.blocks_before(conversation, last)?;
                blocks.into_iter().skip(earlier).collect()
            }
            (LossOn::Assistant | LossOn::LastAssistant, Some(last)) => {
                let turns = Turns::new(self, conversation, &text)?;
                let first = if loss_on == LossOn::LastAssistant { last } else { 0 };
                turns.spans(first)?
            }
        };
        Ok(Rendered { text, spans })
    }

    /// Renders the first `count` messages.
    fn plain(&self, conversation: &Conversation, count: usize, prompt: bool) -> Result<String, TemplateError> {
        let options = RenderOptions { add_generation_prompt: prompt, ..RenderOptions::default() };
        self.render(&conversation.messages[..count], conversation.tools.as_ref(), &options)
    }

    /// How many generation blocks the messages before an assistant's turn have.
    fn blocks_before(&self, conversation: &Conversation, turn: usize) -> Result<usize, TemplateError> {
        if !conversation.messages[..turn].iter().any(|message| message.role() == "assistant") {
            return Ok(0);
        }
        blocks_of(&self.plain(conversation, turn, false)?).map(|(_, blocks)| blocks.len())
    }

    /// Refuses what cannot be followed: characters that the marks are taken from, and lists of parts that the
    /// template does not read but prints.
    fn check_content(&self, conversation: &Conversation, text: &str) -> Result<(), TemplateError> {
        if text.chars().any(marks::is_reserved) {
            return refuse("it has characters of the private-use plane 16, which are used to follow the text");
        }
        for (index, message) in conversation.messages.iter().enumerate() {
            if let Some(parts) = message.content().filter(|content| content.is_array()) {
                let printed = super::python::repr(&minijinja::Value::from(Serde(parts)));
                if printed.is_ok_and(|printed| text.contains(&printed)) {
                    return refuse(format!(
                        "messages[{index}].content is a list of parts, which the template {} prints as it is; write \
                         the content as one string",
                        self.name
                    ));
                }
            }
        }
        Ok(())
    }

    fn shape(&self) -> Result<&TurnShape, TemplateError> {
        let shape = self.shape.get_or_init(|| self.probe());
        shape.as_ref().or_else(|reason| refuse(reason.as_str()))
    }

    /// Finds out how the template frames an assistant's turn.
    fn probe(&self) -> Result<TurnShape, String> {
        let [ask, answer, reply] = PROBES;
        let exchange = |count: usize, prompt: bool| {
            let turns = [("user", ask), ("assistant", answer), ("user", reply)];
            let turns = turns.into_iter().map(|(role, content)| Message::new(role, content));
            let conversation = Conversation::new(turns.collect(), None);
            self.plain(&conversation, count, prompt).map_err(|error| {
                format!("a plain exchange of user and assistant shows how turns are framed, but {error}")
            })
        };
        let (prompt, no_prompt) = (exchange(1, true)?, exchange(1, false)?);
        let (one, more) = (exchange(2, false)?, exchange(3, false)?);
        let unexpected = || format!("the chat template {} does not write each content once, in order", self.name);
        let (before, last_tail) = split_once_only(&one, answer).ok_or_else(unexpected)?;
        let (_, rest) = split_once_only(&more, answer).ok_or_else(unexpected)?;
        let (tail, _) = split_once_only(rest, reply).ok_or_else(unexpected)?;

        let added = &prompt[common_prefix(&prompt, &no_prompt)..];
        let header = match before.strip_prefix(prompt.as_str()) {
            // A prompt that stops short of the role would leave the role to the model.
            Some(gap) if gap.contains("assistant") => "",
            Some(_) => added,
            // The prompt goes on into what the model is to write, such as its first thought.
            None => prompt.strip_prefix(before).and_then(|more| added.strip_suffix(more)).unwrap_or(added),
        };
        let header = (!header.trim().is_empty()).then(|| header.to_owned());
        let end = self.end_of_turn(last_tail, tail)?;
        Ok(TurnShape { header, end })
    }

    /// What ends a turn, from the text behind an answer that is the last and behind one that is not.
    fn end_of_turn(&self, last: &str, earlier: &str) -> Result<Option<String>, String> {
        let (first_in_last, first_in_earlier) = (self.first_added_token(last), self.first_added_token(earlier));
        match first_in_last {
            Some((at, token)) if first_in_earlier == Some((at, token)) && last[..at] == earlier[..at] => {
                Ok(Some(token.to_owned()))
            }
            None if earlier.starts_with(last) => {
                let written = last.trim_matches(is_space);
                Ok((!written.is_empty()).then(|| written.to_owned()))
            }
            _ => Err(format!(
                "the chat template {} ends the last turn with {last:?} and an earlier one with {earlier:?}, so there \
                 is no one end of turn; put {{% generation %}} blocks into the template",
                self.name
            )),
        }
    }

    fn first_added_token(&self, text: &str) -> Option<(usize, &str)> {
        let found = self.added_tokens.iter().filter_map(|token| Some((text.find(token.as_str())?, token.as_str())));
        found.min_by_key(|(at, token)| (*at, usize::MAX - token.len()))
    }
}

/// The length of what two texts begin with alike.
fn common_prefix(a: &str, b: &str) -> usize {
    let differs = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    differs.map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// The text before and after a needle that occurs exactly once.
fn split_once_only<'t>(text: &'t str, needle: &str) -> Option<(&'t str, &'t str)> {
    text.split_once(needle).filter(|(_, after)| !after.contains(needle))
}

/// A conversation rendered with marks, as the ground on which its turns are found.
struct Turns<'a> {
    template: &'a Compiled,
    shape: &'a TurnShape,
    /// What stand-ins stand for.
    markers: Vec<String>,
    /// With marks and stand-ins.
    conversation: Conversation,
    found: Unmarked,
}

impl<'a> Turns<'a> {
    fn new(template: &'a Compiled, conversation: &Conversation, text: &str) -> Result<Self, TemplateError> {
        let shape = template.shape()?;
        let count = conversation.messages.len();
        if count > marks::MAX_MESSAGES {
            return refuse(format!("it has {count} messages, at most {} can be followed", marks::MAX_MESSAGES));
        }
        // Without the white space at their ends, which a template may trim off a content.
        let markers = shape.header.iter().chain(&shape.end).map(|marker| marker.trim_matches(is_space).to_owned());
        let mut markers: Vec<String> = markers.collect();
        markers.sort_by_key(|marker| usize::MAX - marker.len());
        let mut standing = conversation.clone();
        let stands = marks::put_stand_ins(&mut standing, &markers);
        for marking in MARKINGS {
            let mut marked = standing.clone();
            for (index, message) in marked.messages.iter_mut().enumerate() {
                marks::put_marks(message, index, marking);
            }
            // A template may refuse marked contents; the next marking asks less of it.
            let Ok(rendered) = template.plain(&marked, count, false) else { continue };
            let found = Unmarked::new(&rendered, count);
            if marks::restore(&found.text, &markers) == text {
                return Ok(Self { template, shape, markers, conversation: marked, found });
            }
            if marking == Marking::Nothing && stands {
                break;
            }
        }
        refuse("a message contains the template's own markers, and what the template writes depends on them")
    }

    /// The spans of the assistant's turns from message `first` on, in the plain text.
    fn spans(&self, first: usize) -> Result<Vec<Range<usize>>, TemplateError> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (turn, message) in self.conversation.messages.iter().enumerate().skip(first) {
            if message.role() != "assistant" {
                continue;
            }
            let span = match self.span(turn) {
                Ok(span) => span,
                Err(reason) => return refuse(format!("messages[{turn}]: {reason}")),
            };
            if spans.last().is_some_and(|last| span.start < last.end) {
                return refuse(format!("messages[{turn}] starts before the turn before it ends"));
            }
            spans.push(span);
        }
        let plain = |offset| marks::restored_offset(&self.found.text, offset, &self.markers);
        Ok(spans.into_iter().map(|span| plain(span.start)..plain(span.end)).collect())
    }

    fn span(&self, turn: usize) -> Result<Range<usize>, String> {
        if self.found.repeated.contains(&turn) {
            return Err("the template writes its content more than once".into());
        }
        let start = self.start(turn)?;
        let end = self.end(turn, start)?;
        if end < start || self.border(turn, false).is_some_and(|content| content < start) {
            return Err("its content does not follow its header".into());
        }
        Ok(start..end)
    }

    /// The first known place of a message's content.
    fn border(&self, message: usize, back: bool) -> Option<usize> {
        let (fronts, backs) = (&self.found.fronts, &self.found.backs);
        if back { backs[message].or(fronts[message]) } else { fronts[message].or(backs[message]) }
    }

    fn start(&self, turn: usize) -> Result<usize, String> {
        let content = self.border(turn, false);
        if let Some(header) = &self.shape.header {
            let header_end = self.header_before(turn, header);
            if let (Some(end), Some(front)) = (header_end, self.found.fronts[turn])
                && self.found.text[end..front].chars().all(is_space)
                && self.found.text[end..front].len() <= self.leading_space(turn)
            {
                return Ok(end);
            }
            if let Some(before) = self.prefix(turn, true)
                && before.ends_with(header.as_str())
                && self.found.text.starts_with(&before)
                && content.is_none_or(|content| content >= before.len())
            {
                return Ok(before.len());
            }
            if let Some(end) = header_end {
                return Ok(end);
            }
        }
        if self.writes_reasoning(turn)? {
            return Err("it has reasoning, and no generation prompt shows where the turn starts".into());
        }
        let content = self.found.fronts[turn].ok_or(
            "its content is empty or changed by the template, and no generation prompt shows where the turn starts",
        )?;
        self.content_border(turn, content, false)
    }

    /// The end of the header that the template wrote last between the message before a turn and the turn's content.
    fn header_before(&self, turn: usize, header: &str) -> Option<usize> {
        let previous = if turn == 0 { 0 } else { self.border(turn - 1, true)? };
        let between = self.found.text.get(previous..self.border(turn, false)?)?;
        between.rfind(header).map(|at| previous + at + header.len())
    }

    /// How many bytes of white space a content begins with.
    fn leading_space(&self, turn: usize) -> usize {
        let text = self.conversation.messages[turn].content().and_then(|content| content.as_str());
        text.map_or(0, |text| text.len() - text.trim_start_matches(is_space).len())
    }

    fn end(&self, turn: usize, start: usize) -> Result<usize, String> {
        let text = &self.found.text;
        let content = self.border(turn, true).unwrap_or(start).max(start);
        let Some(end) = &self.shape.end else {
            let back = self.found.backs[turn].ok_or("no token ends the turn, and the template changes its content")?;
            return self.content_border(turn, back, true);
        };
        let at = text[content..].find(end.as_str());
        let end = at.map(|at| content + at + end.len()).ok_or_else(|| format!("it does not end with {end:?}"))?;
        if end > self.limit(turn)? {
            return Err(format!("it does not end with {:?} of its own", self.shape.end.as_deref().unwrap_or_default()));
        }
        Ok(end)
    }

    /// A place that a turn cannot reach beyond.
    fn limit(&self, turn: usize) -> Result<usize, String> {
        if turn + 1 == self.conversation.messages.len() {
            return Ok(self.found.text.len());
        }
        if let Some(next) = self.border(turn + 1, false) {
            return Ok(next);
        }
        // With and without the generation prompt: what both begin with is the turn and all before it, whatever a
        // template writes at the very end.
        let through = self.prefix(turn + 1, false).zip(self.prefix(turn + 1, true));
        let through = through.map(|(plain, prompted)| plain[..common_prefix(&plain, &prompted)].to_owned());
        match through {
            Some(through) if self.found.text.starts_with(&through) => Ok(through.len()),
            _ => Err(format!("the template does not show where messages[{}] starts", turn + 1)),
        }
    }

    /// Whether the text has the reasoning of a message.
    fn writes_reasoning(&self, turn: usize) -> Result<bool, String> {
        let mut without = self.conversation.clone();
        let fields = without.messages[turn].fields_mut();
        let before = fields.len();
        fields.retain(|key, _| !REASONING.contains(&key.as_str()));
        if fields.len() == before {
            return Ok(false);
        }
        let count = without.messages.len();
        let rendered = self.template.plain(&without, count, false).map_err(|error| error.to_string())?;
        Ok(Unmarked::new(&rendered, count).text != self.found.text)
    }

    /// The rendering of the first messages, without marks; `None` when the template refuses them.
    fn prefix(&self, count: usize, prompt: bool) -> Option<String> {
        let rendered = self.template.plain(&self.conversation, count, prompt).ok()?;
        Some(Unmarked::new(&rendered, self.conversation.messages.len()).text)
    }

    /// A border of a content with its white space, as far as the template writes that: found by rendering the
    /// content without it.
    fn content_border(&self, turn: usize, mark: usize, back: bool) -> Result<usize, String> {
        let mut stripped = self.conversation.clone();
        let Some(text) = marks::content_text(&mut stripped.messages[turn], back) else { return Ok(mark) };
        let kept = if back { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
        let kept = kept.to_owned();
        let space = if back { text[kept.len()..].to_owned() } else { text[..text.len() - kept.len()].to_owned() };
        if space.is_empty() {
            return Ok(mark);
        }
        *text = kept;
        let unclear = "how the template treats white space around its content is not clear";
        let messages = stripped.messages.len();
        let rendered = self.template.plain(&stripped, messages, false).map_err(|_| unclear)?;
        let other = Unmarked::new(&rendered, messages);
        if other.text == self.found.text {
            return Ok(mark);
        }
        let place = if back { other.backs[turn] } else { other.fronts[turn] }.ok_or(unclear)?;
        let (before, after) = other.text.split_at(place);
        if self.found.text == format!("{before}{space}{after}") {
            return Ok(if back { mark + space.len() } else { mark - space.len() });
        }
        Err(unclear.into())
    }
}
