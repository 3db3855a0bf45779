//! What the model writes before and after training, on a row of the data.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::Module;
use emberlora_data::{ChatTemplate, Document, Tokenizer};
use emberlora_model::CausalLm;
use emberlora_model::generate::{Generator, SamplingOptions};
use emberlora_train::Base;

use crate::stop;

/// The most tokens that a sample has.
const LONGEST: usize = 64;
/// Where all of a row is trained, as text is, this many of its tokens make a prompt.
const OPENING: usize = 16;

/// A row's prompt, and what the row says next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sample<'a> {
    prompt: &'a [u32],
    expected: &'a [u32],
}

impl<'a> Sample<'a> {
    /// The tokens before the first trained one, and the trained ones from there on. `None` for a row that is too short.
    pub(crate) fn of(row: &'a Document) -> Option<Self> {
        // The first token cannot be predicted, so a row that begins trained is one that is trained as a whole.
        let first = row.trained.iter().skip(1).position(|&trained| trained)? + 1;
        let border = if first > 1 { first } else { OPENING.min(row.ids.len() / 2).max(1) };
        let (prompt, rest) = row.ids.split_at(border);
        let end = row.trained[border..].iter().position(|&trained| !trained).unwrap_or(rest.len());
        Some(Self { prompt, expected: &rest[..end.min(LONGEST)] })
    }

    /// Lets both models continue the prompt, taking the most likely token each time. `None` once `interrupt` is raised.
    pub(crate) fn write(
        &self,
        base: &Base,
        template: Option<&ChatTemplate>,
        [before, after]: [&CausalLm; 2],
        interrupt: &AtomicBool,
    ) -> anyhow::Result<Option<Written>> {
        let options = SamplingOptions::greedy(LONGEST, stop::tokens(base, template)?);
        let continued = |model: &CausalLm| -> anyhow::Result<Option<String>> {
            let model = model.valid();
            let mut ids = Vec::new();
            let mut generator = Generator::new(&model, self.prompt, options.clone())?;
            for id in generator.by_ref() {
                if interrupt.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                ids.push(id);
            }
            // The run itself went well, so this is no error.
            generator.error().into_iter().for_each(|reason| tracing::warn!("the sample ends early: {reason}"));
            Ok(Some(base.tokenizer.decode(&ids, true)?))
        };
        let text = |tokenizer: &Tokenizer, ids: &[u32], skip_special| tokenizer.decode(ids, skip_special);
        let Some(before) = continued(before)? else { return Ok(None) };
        let Some(after) = continued(after)? else { return Ok(None) };
        Ok(Some(Written {
            prompt: text(&base.tokenizer, self.prompt, false)?,
            expected: text(&base.tokenizer, self.expected, true)?,
            before,
            after,
        }))
    }
}

/// A sample as text.
pub(crate) struct Written {
    prompt: String,
    expected: String,
    before: String,
    after: String,
}

impl Written {
    pub(crate) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let Self { prompt, expected, before, after } = self;
        for (name, text) in [("prompt", prompt), ("expected", expected), ("before", before), ("after", after)] {
            writeln!(out, "\n{name}")?;
            for line in crate::inspect::printable(text).trim().lines() {
                writeln!(out, "  {line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use emberlora_config::RunConfig;
    use emberlora_data::RowRef;
    use emberlora_train::{AdapterChoice, LoadedModel};

    use super::*;

    fn check(trained: &[bool], expected: Option<(std::ops::Range<u32>, std::ops::Range<u32>)>) {
        let ids: Vec<u32> = (0..trained.len() as u32).collect();
        let row = Document::new(ids, trained.to_vec(), RowRef::new(Path::new("a").into(), 1), None);
        let found = Sample::of(&row).map(|sample| (sample.prompt.to_vec(), sample.expected.to_vec()));
        assert_eq!(found, expected.map(|(prompt, rest)| (prompt.collect(), rest.collect())));
    }

    #[test]
    fn an_interruption_ends_a_sample() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/model");
        let recipe = format!("model: {{source: {}}}\ndata: {{train: a.jsonl}}\noutput: out\n", model.display());
        let config = RunConfig::parse(&recipe, "recipe.yaml", &[]).unwrap();
        let base = Base::resolve(&config, &()).unwrap();
        let model = LoadedModel::load(&config, &base, AdapterChoice::Start).unwrap().model;
        let sample = Sample { prompt: &[1, 300], expected: &[301] };
        let written = |raised| sample.write(&base, None, [&model, &model], &AtomicBool::new(raised)).unwrap();
        assert!(written(true).is_none());
        let Written { before, after, .. } = written(false).unwrap();
        assert_eq!(before, after);
    }

    #[test]
    fn the_prompt_ends_where_training_begins() {
        check(&[false, false, true, true, false, true], Some((0..2, 2..4)));
    }

    #[test]
    fn text_is_cut_in_half() {
        check(&[true; 6], Some((0..3, 3..6)));
        check(&[false, true, true, true, true, true], Some((0..3, 3..6)));
        check(&[true; 100], Some((0..16, 16..80)));
    }

    #[test]
    fn a_row_that_trains_nothing_gives_no_sample() {
        check(&[false, false], None);
        check(&[true], None);
        check(&[], None);
    }
}
