//! Between the recipe's `quantization` section and a model's options.

use emberlora_config::{QuantizationKind, QuantizationSection};
use emberlora_model::QuantizationOptions;
use emberlora_quant::{BlockSize, QuantKind, Scheme, UnknownBlockSize};

/// The largest block that recipes have a number for; checkpoints may have larger ones.
const LARGEST_BLOCK: usize = 512;

/// What the section says where its kind has no threshold.
const UNUSED_THRESHOLD: f64 = 6.0;

/// What a recipe's `quantization` asks for.
///
/// # Errors
/// [`UnknownBlockSize`] for a number that no recipe with it would have been read.
pub fn quantization_options(section: &QuantizationSection) -> Result<QuantizationOptions, UnknownBlockSize> {
    // Without `..`, so that a new key of the recipe cannot be forgotten here.
    let QuantizationSection { kind, double_quant, block_size, skip, threshold } = section;
    let kind = match kind {
        QuantizationKind::Nf4 => QuantKind::Nf4,
        QuantizationKind::Fp4 => QuantKind::Fp4,
        QuantizationKind::Int8 => QuantKind::Int8,
    };
    let scheme = Scheme::new(kind, BlockSize::try_from(*block_size)?, *double_quant);
    Ok(QuantizationOptions::new(scheme, skip.clone(), *threshold as f32))
}

/// The section that asks for what a directory turned out to hold; `None` where no recipe can.
pub(crate) fn quantization_section(options: &QuantizationOptions) -> Option<QuantizationSection> {
    let QuantizationOptions { scheme, skip, threshold } = options;
    let kind = match scheme.kind() {
        QuantKind::Nf4 => QuantizationKind::Nf4,
        QuantKind::Fp4 => QuantizationKind::Fp4,
        QuantKind::Int8 => QuantizationKind::Int8,
    };
    let (double_quant, block_size) = match *scheme {
        Scheme::FourBit { block_size, double_quant, .. } => (double_quant, block_size.get()),
        Scheme::Int8 => (true, BlockSize::default().get()),
    };
    let threshold = if scheme.kind() == QuantKind::Int8 { f64::from(*threshold) } else { UNUSED_THRESHOLD };
    let section = QuantizationSection::new(kind, double_quant, block_size, skip.clone(), threshold);
    (block_size <= LARGEST_BLOCK).then_some(section)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_survives_the_way_through_the_options() {
        let skip = || vec!["lm_head".to_owned(), "o_proj".to_owned()];
        for section in [
            QuantizationSection::new(QuantizationKind::Nf4, true, 64, skip(), 6.0),
            QuantizationSection::new(QuantizationKind::Fp4, false, 512, skip(), 6.0),
            QuantizationSection::new(QuantizationKind::Int8, true, 64, Vec::new(), 1.5),
        ] {
            let options = quantization_options(&section).unwrap();
            assert_eq!(options.scheme.kind().name(), section.kind.to_string());
            assert_eq!(quantization_section(&options), Some(section));
        }
    }

    #[test]
    fn blocks_that_recipes_do_not_know_stay_the_directorys_own() {
        let large = Scheme::new(QuantKind::Nf4, BlockSize::try_from(1024).unwrap(), true);
        assert_eq!(quantization_section(&QuantizationOptions::new(large, Vec::new(), 0.0)), None);
    }
}
