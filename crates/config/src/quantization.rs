//! `quantization`: how the frozen weights are packed.

use serde_json::Value as Json;

use crate::node::{Content, Node};
use crate::spec::{Below, Reader, Section, Spec, among, boolean, choice, list, number, required, section, text, value};

choice! {
    /// A format of packed weights, as bitsandbytes has it.
    pub enum QuantizationKind {
        /// 4-bit NormalFloat (Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>).
        Nf4 = "nf4";
        /// 4-bit floating point.
        Fp4 = "fp4";
        /// 8-bit integers with a scale for every row (Dettmers et al. 2022, <https://arxiv.org/abs/2208.07339>).
        Int8 = "int8";
    }
}

section! {
    /// Packed storage of the frozen weights: QLoRA. Embeddings and norms are never packed, nor is a head that is tied to the
    /// embedding; a model that is already quantised must have been quantised like this. `null` keeps the weights as
    /// `model.dtype` says.
    #[derive(derive_new::new)]
    pub struct QuantizationSection {
        /// `nf4` and `fp4` take 4 bits per weight and a scale for every block, `int8` takes 8 bits and a scale for every row.
        kind: QuantizationKind = required(QuantizationKind::Nf4) => choice();
        /// Store the scales in 8 bits as well, in blocks of 256: 4.127 instead of 4.5 bits per weight at a `block_size` of
        /// 64. Only with `nf4` and `fp4`.
        double_quant: bool = value(true) => boolean();
        /// Weights that share a scale. Only with `nf4` and `fp4`.
        block_size: usize = value(64) => among(&[32, 64, 128, 256, 512]);
        /// Projections that are kept as they are: those whose module path equals, begins or ends with one of these names, as
        /// in transformers.
        skip: Vec<String> = value(vec!["lm_head".to_owned()]) => list(text());
        /// Inputs that hold a value of at least this magnitude are multiplied in full precision, column by column, and all
        /// others in 8 bits; 0 multiplies everything with the dequantised weights. Only with `int8`.
        threshold: f64 = value(6.0) => number().at_least(0.0);
    }
    check check_quantization;
}

/// The keys that mean something to other kinds only.
fn foreign_keys(kind: QuantizationKind) -> &'static [&'static str] {
    match kind {
        QuantizationKind::Nf4 | QuantizationKind::Fp4 => &["threshold"],
        QuantizationKind::Int8 => &["double_quant", "block_size"],
    }
}

fn check_quantization(quantization: &mut QuantizationSection, node: &Node, reader: &mut Reader<'_>) {
    let kind = quantization.kind;
    // A missing or misspelt kind is reported already, and what stands in for it forbids nothing.
    if node.get("kind").is_none_or(|written| written.content != Content::Text(kind.name().to_owned())) {
        return;
    }
    for key in foreign_keys(kind) {
        if node.get(key).is_some() {
            let allowed = match kind {
                QuantizationKind::Int8 => "no such key, or `kind: nf4` or `kind: fp4`",
                QuantizationKind::Nf4 | QuantizationKind::Fp4 => "no such key, or `kind: int8`",
            };
            reader.conflict(node, key, &format!("has no effect with `kind: {kind}`"), allowed);
        }
    }
}

/// A [`QuantizationSection`], written without the keys that its kind does not have.
pub(crate) struct QuantizationSpec;

impl Spec for QuantizationSpec {
    type Out = QuantizationSection;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<QuantizationSection> {
        QuantizationSection::read(node, reader)
    }

    fn write(&self, value: &QuantizationSection) -> Node {
        value.write().without(foreign_keys(value.kind))
    }

    fn allowed(&self) -> String {
        section::<QuantizationSection>().allowed()
    }

    fn schema(&self) -> Json {
        section::<QuantizationSection>().schema()
    }

    fn below(&self) -> Below {
        section::<QuantizationSection>().below()
    }
}
