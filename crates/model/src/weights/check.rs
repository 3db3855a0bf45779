//! Names and shapes of the files against those of the model, in both directions.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::{LoadError, Mismatch, Misshaped};
use super::layout::{EMBEDDING, HEAD, tensors};
use super::packing::Plan;
use super::source::WeightSource;
use crate::config::ModelConfig;

/// Where the two ends of the model come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub embedding: &'static str,
    /// `None`: the head is the embedding.
    pub head: Option<&'static str>,
}

/// The projections of a model with the shapes of their weights; a head that is the embedding is none of them.
pub(super) type Projections = BTreeMap<String, [usize; 2]>;

/// Compares everything and returns the ends, the projections, and the tensors that are there and rightly not used.
///
/// The shape of a packed weight is not that of its tensor and is compared when it is read.
pub(super) fn check(
    dir: &Path,
    config: &ModelConfig,
    source: &WeightSource,
    plan: &Plan<'_>,
) -> Result<(Ends, Projections, Vec<String>), LoadError> {
    let ends = ends(config, source)?;
    let mut needed = tensors(config);
    let width = [config.vocab_size, config.hidden_size];
    needed.extend(ends.head.map(|name| (name.to_owned(), width.to_vec())));
    let projections: Projections = needed.iter().filter_map(|(name, shape)| projection(name, shape)).collect();
    needed.push((ends.embedding.to_owned(), width.to_vec()));

    let mut mismatch = Mismatch::default();
    let mut unused = source.names();
    for (name, expected) in &needed {
        unused.remove(name.as_str());
        let is_packed = name != ends.embedding && plan.claim(name, &mut unused);
        match source.shape(name) {
            None => mismatch.missing.push((name.clone(), None)),
            Some(found) if is_packed || found == expected => {}
            Some(found) => {
                let (name, expected, found) = (name.clone(), expected.clone(), found.to_vec());
                mismatch.misshaped.push(Misshaped { name, expected, found });
            }
        }
    }
    let (ignored, unused): (Vec<&str>, Vec<&str>) = unused.into_iter().partition(|name| is_redundant(name, ends));
    mismatch.missing.sort();
    for (name, nearest) in &mut mismatch.missing {
        *nearest = most_similar(name, &unused);
    }
    mismatch.unused = unused.into_iter().map(str::to_owned).collect();
    if !mismatch.is_empty() {
        return Err(LoadError::Mismatch { dir: dir.to_owned(), mismatch });
    }
    plan.check(&projections)?;
    Ok((ends, projections, ignored.into_iter().map(str::to_owned).collect()))
}

/// The module of a weight with two dimensions.
fn projection(name: &str, shape: &[usize]) -> Option<(String, [usize; 2])> {
    Some((name.strip_suffix(".weight")?.to_owned(), shape.try_into().ok()?))
}

/// Tying as transformers 5 does it: the config asks for it, either tensor may be the one that was saved, and two that
/// were saved with different values stay two.
fn ends(config: &ModelConfig, source: &WeightSource) -> Result<Ends, LoadError> {
    let untied = Ends { embedding: EMBEDDING, head: Some(HEAD) };
    if !config.tie_word_embeddings {
        return Ok(untied);
    }
    Ok(match (source.contains(EMBEDDING), source.contains(HEAD)) {
        (false, true) => Ends { embedding: HEAD, head: None },
        (true, true) => match (source.entry(EMBEDDING)?, source.entry(HEAD)?) {
            (Some((file, entry)), Some((other, of))) if !file.same_bytes(&entry, other, &of) => {
                tracing::warn!("config.json ties head and embedding, but the files hold different ones: not tied");
                untied
            }
            _ => Ends { embedding: EMBEDDING, head: None },
        },
        _ => Ends { embedding: EMBEDDING, head: None },
    })
}

/// Tensors that older versions saved although they follow from the config, and the second copy of a tied pair.
fn is_redundant(name: &str, ends: Ends) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (ends.head.is_none() && (name == HEAD || name == EMBEDDING))
}

fn most_similar(name: &str, candidates: &[&str]) -> Option<String> {
    candidates
        .iter()
        .map(|candidate| (strsim::normalized_levenshtein(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| (*candidate).to_owned())
}
