use crate::LoraError;
use crate::rules::Rules;

/// How adapters are made and where they go. The fields mean what the fields of PEFT's `LoraConfig` mean.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    /// r, the rank of the update.
    pub r: usize,
    /// α: the update is scaled by α / r, or by α / √r with `rslora`.
    pub alpha: f64,
    /// Probability with which an element of the adapter's input is dropped in training.
    pub dropout: f64,
    /// Which projections get an adapter.
    pub targets: Targets,
    /// Which of them do not, after all.
    pub exclude: Exclude,
    /// Restricts the targets to the layers with these indices; `None` or empty means all layers.
    pub layers: Option<Vec<usize>>,
    /// Names of the module list whose index counts as the layer, regular expressions as in PEFT; empty means any.
    pub layers_pattern: Vec<String>,
    /// Ranks of single modules: the first pattern `p` for which `(.*\.)?(p)$` matches the module's name wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// Values of α of single modules, matched like `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Rank-stabilised scaling (Kalajdzievski, 2023): α / √r instead of α / r.
    pub rslora: bool,
    /// Seed of the initial values of A.
    pub seed: u64,
}

const FINITE: &str = "finite in single precision";

impl Default for LoraOptions {
    /// The defaults of PEFT's `LoraConfig` with `all-linear` as targets.
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            targets: Targets::AllLinear,
            exclude: Exclude::default(),
            layers: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            rslora: false,
            seed: 0,
        }
    }
}

/// Which projections get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every projection but the output head.
    AllLinear,
    /// Every projection whose name is, or ends with a dot and, one of these.
    Suffixes(Vec<String>),
    /// Every projection whose whole name matches (Python's `re.fullmatch`).
    Regex(String),
}

/// Which targeted projections get no adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclude {
    /// Every projection whose name is, or ends with a dot and, one of these.
    Suffixes(Vec<String>),
    /// Every projection whose whole name matches (Python's `re.fullmatch`).
    Regex(String),
}

impl Default for Exclude {
    /// Excludes nothing.
    fn default() -> Self {
        Self::Suffixes(Vec::new())
    }
}

impl LoraOptions {
    /// s, the factor on B A, for a module with this rank and this α.
    pub fn scale(&self, rank: usize, alpha: f64) -> f32 {
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
    }

    /// Checks what can be checked without a model: the numbers, and that every pattern is a regular expression. Cheap
    /// enough to be called before anything is loaded; [`attach()`](crate::attach()) checks the same again.
    ///
    /// # Errors
    /// The first option that no model could be adapted with.
    pub fn check(&self) -> Result<(), LoraError> {
        Rules::new(self).map(drop)
    }

    /// Checks the numbers; the patterns are checked when they are compiled.
    pub(crate) fn validate(&self) -> Result<(), LoraError> {
        let fail = |field: String, value: String, expected: &'static str| {
            Err(LoraError::InvalidOption { field, value, expected })
        };
        if self.r == 0 {
            return fail("r".into(), "0".into(), "a rank of at least 1");
        }
        // The scale is used in f32.
        let finite = |alpha: f64| (alpha as f32).is_finite();
        if !finite(self.alpha) {
            return fail("alpha".into(), self.alpha.to_string(), FINITE);
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail("dropout".into(), self.dropout.to_string(), "a probability of at least 0 and below 1");
        }
        if let Some((pattern, rank)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return fail(format!("rank_pattern.{pattern}"), rank.to_string(), "a rank of at least 1");
        }
        if let Some((pattern, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !finite(*alpha)) {
            return fail(format!("alpha_pattern.{pattern}"), alpha.to_string(), FINITE);
        }
        Ok(())
    }
}
