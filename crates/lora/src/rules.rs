//! PEFT's rules, compiled: which module gets an adapter, and with which rank and α.

use fancy_regex::Regex;

use crate::{Exclude, LoraError, LoraOptions, Targets};

/// What the rules say about one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It gets an adapter.
    Adapted,
    /// No target matches it.
    NotTargeted,
    /// A target matches it, but `exclude` does too.
    Excluded,
    /// A target matches it, but it is in none of the chosen layers.
    OtherLayer,
}

/// [`LoraOptions`] with its expressions compiled.
pub(crate) struct Rules<'a> {
    options: &'a LoraOptions,
    target: Option<Expression>,
    exclude: Option<Expression>,
    layers_patterns: Vec<Expression>,
    ranks: Vec<Expression>,
    alphas: Vec<Expression>,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(options: &'a LoraOptions) -> Result<Self, LoraError> {
        options.validate()?;
        let full = |field, pattern: &str| Expression::new(field, pattern, format!(r"\A(?:{pattern})\z"));
        // As in PEFT's `get_pattern_key`: `re.match` anchors the start, `$` the end.
        let tail = |field, pattern: &str| Expression::new(field, pattern, format!(r"\A(.*\.)?({pattern})$"));
        let layer = |pattern: &String| {
            let wrapped = format!(r"\A(?:(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.)");
            Expression::new("layers_pattern", pattern, wrapped)
        };
        let target = match &options.targets {
            Targets::Regex(pattern) => Some(full("targets", pattern)?),
            Targets::AllLinear | Targets::Suffixes(_) => None,
        };
        let exclude = match &options.exclude {
            // PEFT tests for truth, so an empty expression excludes nothing.
            Exclude::Regex(pattern) if !pattern.is_empty() => Some(full("exclude", pattern)?),
            Exclude::Regex(_) | Exclude::Suffixes(_) => None,
        };
        let rules = Self {
            options,
            target,
            exclude,
            layers_patterns: options.layers_pattern.iter().map(layer).collect::<Result<_, _>>()?,
            ranks: options.rank_pattern.iter().map(|(p, _)| tail("rank_pattern", p)).collect::<Result<_, _>>()?,
            alphas: options.alpha_pattern.iter().map(|(p, _)| tail("alpha_pattern", p)).collect::<Result<_, _>>()?,
        };
        if rules.layers().is_some() && rules.target.is_some() {
            return Err(LoraError::LayersWithRegex);
        }
        Ok(rules)
    }

    /// The chosen layers; an empty list chooses all, as in PEFT.
    pub(crate) fn layers(&self) -> Option<&'a [usize]> {
        self.options.layers.as_deref().filter(|layers| !layers.is_empty())
    }

    /// Decides about the module `name`.
    pub(crate) fn verdict(&self, name: &str, is_head: bool) -> Result<Verdict, LoraError> {
        if !self.targets(name, is_head)? {
            return Ok(Verdict::NotTargeted);
        }
        if self.excludes(name)? {
            return Ok(Verdict::Excluded);
        }
        let Some(layers) = self.layers().filter(|_| !self.named_in_full(name)) else {
            return Ok(Verdict::Adapted);
        };
        let chosen = self.layer_of(name)?.is_some_and(|layer| layers.contains(&layer));
        Ok(if chosen { Verdict::Adapted } else { Verdict::OtherLayer })
    }

    /// The rank and α of the module `name`.
    pub(crate) fn rank_and_alpha(&self, name: &str) -> Result<(usize, f64), LoraError> {
        let rank = first_match(&self.ranks, name)?.map_or(self.options.r, |i| self.options.rank_pattern[i].1);
        let alpha = first_match(&self.alphas, name)?.map_or(self.options.alpha, |i| self.options.alpha_pattern[i].1);
        Ok((rank, alpha))
    }

    /// The index of the layer that the module `name` belongs to.
    pub(crate) fn layer_of(&self, name: &str) -> Result<Option<usize>, LoraError> {
        if self.layers_patterns.is_empty() {
            return Ok(first_index(name));
        }
        for pattern in &self.layers_patterns {
            if let Some(index) = pattern.capture(name)? {
                return Ok(index.parse().ok());
            }
        }
        Ok(None)
    }

    /// The entries of `rank_pattern` and `alpha_pattern` that decide about none of these modules.
    pub(crate) fn unused_patterns(&self, modules: &[&str]) -> Result<Vec<String>, LoraError> {
        let mut unused = Vec::new();
        for (field, expressions) in [("rank_pattern", &self.ranks), ("alpha_pattern", &self.alphas)] {
            let mut used = vec![false; expressions.len()];
            for module in modules {
                if let Some(index) = first_match(expressions, module)? {
                    used[index] = true;
                }
            }
            let idle = expressions.iter().zip(used).filter(|(_, used)| !used);
            unused.extend(idle.map(|(expression, _)| format!("{field}.{}", expression.pattern)));
        }
        Ok(unused)
    }

    fn targets(&self, name: &str, is_head: bool) -> Result<bool, LoraError> {
        match (&self.options.targets, &self.target) {
            (Targets::Suffixes(suffixes), _) => Ok(suffixes.iter().any(|suffix| is_suffix(name, suffix))),
            (_, Some(expression)) => expression.matches(name),
            (_, None) => Ok(!is_head),
        }
    }

    fn excludes(&self, name: &str) -> Result<bool, LoraError> {
        match (&self.options.exclude, &self.exclude) {
            (Exclude::Suffixes(suffixes), _) => Ok(suffixes.iter().any(|suffix| is_suffix(name, suffix))),
            (_, Some(expression)) => expression.matches(name),
            (_, None) => Ok(false),
        }
    }

    /// PEFT does not look at the layer of a module that is listed with its full name.
    fn named_in_full(&self, name: &str) -> bool {
        matches!(&self.options.targets, Targets::Suffixes(suffixes) if suffixes.iter().any(|suffix| suffix == name))
    }
}

/// Whether a module's name is `suffix`, or ends with a dot and `suffix`.
pub(crate) fn is_suffix(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// PEFT's `.*?\.[^.]*\.(?P<idx>\d+)\.` from the start: the first numeric part that has two parts before it and one
/// behind it, such as the 3 of `model.layers.3.mlp`.
fn first_index(name: &str) -> Option<usize> {
    let parts: Vec<&str> = name.split('.').collect();
    let (_, inner) = parts.split_last()?;
    let index = inner.iter().skip(2).find(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))?;
    index.parse().ok()
}

fn first_match(expressions: &[Expression], name: &str) -> Result<Option<usize>, LoraError> {
    for (index, expression) in expressions.iter().enumerate() {
        if expression.matches(name)? {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// A compiled expression that remembers where it came from.
struct Expression {
    field: &'static str,
    pattern: String,
    regex: Regex,
}

impl Expression {
    fn new(field: &'static str, pattern: &str, wrapped: String) -> Result<Self, LoraError> {
        let pattern = pattern.to_owned();
        match Regex::new(&wrapped) {
            Ok(regex) => Ok(Self { field, pattern, regex }),
            Err(source) => Err(LoraError::Regex { field, pattern, source: Box::new(source) }),
        }
    }

    fn matches(&self, name: &str) -> Result<bool, LoraError> {
        self.regex.is_match(name).map_err(|source| self.error(source))
    }

    /// The text of the group `idx`, if the expression matches.
    fn capture<'t>(&self, name: &'t str) -> Result<Option<&'t str>, LoraError> {
        let captures = self.regex.captures(name).map_err(|source| self.error(source))?;
        Ok(captures.and_then(|captures| captures.name("idx")).map(|group| group.as_str()))
    }

    fn error(&self, source: fancy_regex::Error) -> LoraError {
        LoraError::Regex { field: self.field, pattern: self.pattern.clone(), source: Box::new(source) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q0: &str = "model.layers.0.self_attn.q_proj";
    const Q11: &str = "model.layers.11.self_attn.q_proj";

    fn suffixes(list: &[&str]) -> Targets {
        Targets::Suffixes(list.iter().map(|s| s.to_string()).collect())
    }

    fn check(options: LoraOptions, name: &str, expected: Verdict) {
        let verdict = Rules::new(&options).unwrap().verdict(name, name == "lm_head").unwrap();
        assert_eq!(verdict, expected, "{name} with {options:?}");
    }

    fn with(targets: Targets) -> LoraOptions {
        LoraOptions { targets, ..LoraOptions::default() }
    }

    #[test]
    fn all_linear_is_everything_but_the_head() {
        check(with(Targets::AllLinear), Q0, Verdict::Adapted);
        check(with(Targets::AllLinear), "lm_head", Verdict::NotTargeted);
    }

    #[test]
    fn suffixes_match_whole_parts() {
        check(with(suffixes(&["q_proj"])), Q0, Verdict::Adapted);
        check(with(suffixes(&["self_attn.q_proj"])), Q0, Verdict::Adapted);
        check(with(suffixes(&[Q0])), Q0, Verdict::Adapted);
        check(with(suffixes(&["proj"])), Q0, Verdict::NotTargeted);
        check(with(suffixes(&[""])), Q0, Verdict::NotTargeted);
        check(with(suffixes(&["lm_head"])), "lm_head", Verdict::Adapted);
    }

    #[test]
    fn expressions_match_the_whole_name() {
        let regex = |pattern: &str| with(Targets::Regex(pattern.into()));
        check(regex(r".*\.(q|v)_proj"), Q0, Verdict::Adapted);
        check(regex("q_proj"), Q0, Verdict::NotTargeted);
        check(regex(r"model\.layers\.1|.*q_proj"), Q11, Verdict::Adapted);
        // Python's look-behind, which the `regex` crate alone does not know.
        check(regex(r"model\.layers\.(?!0\.).*(?<=q)_proj"), Q11, Verdict::Adapted);
        check(regex(r"model\.layers\.(?!0\.).*(?<=q)_proj"), Q0, Verdict::NotTargeted);
    }

    #[test]
    fn exclusion_wins_over_targets() {
        let exclude = |exclude| LoraOptions { exclude, ..with(suffixes(&["q_proj"])) };
        check(exclude(Exclude::Suffixes(vec!["layers.0.self_attn.q_proj".into()])), Q0, Verdict::Excluded);
        check(exclude(Exclude::Suffixes(vec!["layers.0.self_attn.q_proj".into()])), Q11, Verdict::Adapted);
        check(exclude(Exclude::Regex(r".*\.0\..*".into())), Q0, Verdict::Excluded);
        check(exclude(Exclude::Regex("q_proj".into())), Q0, Verdict::Adapted);
        check(exclude(Exclude::Regex(String::new())), Q0, Verdict::Adapted);
    }

    #[test]
    fn layers_choose_by_the_first_index_in_the_name() {
        let layers = |list: &[usize]| LoraOptions { layers: Some(list.to_vec()), ..with(suffixes(&["q_proj"])) };
        check(layers(&[0]), Q0, Verdict::Adapted);
        check(layers(&[0]), Q11, Verdict::OtherLayer);
        check(layers(&[1]), Q11, Verdict::OtherLayer);
        check(layers(&[]), Q11, Verdict::Adapted);
        check(layers(&[3]), "model.layers.3.experts.0.q_proj", Verdict::Adapted);
        check(layers(&[0]), "decoder.q_proj", Verdict::OtherLayer);
        // PEFT's rule needs two parts before the index.
        check(layers(&[0]), "layers.0.q_proj", Verdict::OtherLayer);
        let full = LoraOptions { targets: suffixes(&[Q11]), ..layers(&[0]) };
        check(full, Q11, Verdict::Adapted);
    }

    #[test]
    fn layers_pattern_names_the_list() {
        let options = |pattern: &str| LoraOptions {
            layers: Some(vec![2]),
            layers_pattern: vec![pattern.into()],
            ..with(suffixes(&["q_proj"]))
        };
        check(options("blocks"), "model.layers.1.blocks.2.q_proj", Verdict::Adapted);
        check(options("layers"), "model.layers.1.blocks.2.q_proj", Verdict::OtherLayer);
        check(options("layers"), "layers.2.q_proj", Verdict::Adapted);
    }

    #[test]
    fn the_first_pattern_that_matches_gives_rank_and_alpha() {
        let options = LoraOptions {
            rank_pattern: vec![("layers.0.self_attn.q_proj".into(), 2), ("q_proj".into(), 4), (".*".into(), 6)],
            alpha_pattern: vec![("^model.layers.1.*".into(), 3.0), ("proj".into(), 5.0)],
            ..LoraOptions::default()
        };
        let rules = Rules::new(&options).unwrap();
        assert_eq!(rules.rank_and_alpha(Q0).unwrap(), (2, 8.0));
        assert_eq!(rules.rank_and_alpha(Q11).unwrap(), (4, 3.0));
        assert_eq!(rules.rank_and_alpha("lm_head").unwrap(), (6, 8.0));
        assert_eq!(
            rules.unused_patterns(&[Q0]).unwrap(),
            ["rank_pattern.q_proj", "rank_pattern..*", "alpha_pattern.^model.layers.1.*", "alpha_pattern.proj"]
        );
    }

    #[test]
    fn broken_expressions_and_numbers_are_named() {
        let message = |options: LoraOptions| match Rules::new(&options) {
            Ok(_) => panic!("accepted {options:?}"),
            Err(error) => error.to_string(),
        };
        assert!(message(with(Targets::Regex("(".into()))).starts_with("targets: `(` cannot be used"));
        let options = LoraOptions { rank_pattern: vec![("[".into(), 4)], ..LoraOptions::default() };
        assert!(message(options).starts_with("rank_pattern: `[`"));
        let options = LoraOptions { layers: Some(vec![0]), ..with(Targets::Regex(".*".into())) };
        assert!(message(options).contains("cannot be combined"));
        assert!(message(LoraOptions { r: 0, ..LoraOptions::default() }).starts_with("r is 0"));
        assert!(message(LoraOptions { dropout: 1.0, ..LoraOptions::default() }).starts_with("dropout is 1"));
        assert!(message(LoraOptions { dropout: f64::NAN, ..LoraOptions::default() }).starts_with("dropout is NaN"));
        assert!(message(LoraOptions { alpha: f64::INFINITY, ..LoraOptions::default() }).starts_with("alpha is inf"));
    }
}
