//! `model`: which base model, and in which formats it is stored and computed.

use crate::spec::{choice, required, text, value};

choice! {
    /// A float format, or `auto`.
    pub enum Dtype {
        /// Decided by what is at hand; the key's own text says how.
        Auto = "auto";
        /// 32-bit IEEE float.
        F32 = "f32" | "float32";
        /// bfloat16: 8 bits of exponent, 7 of mantissa.
        Bf16 = "bf16" | "bfloat16";
        /// 16-bit IEEE float.
        F16 = "f16" | "float16";
    }
}

choice! {
    /// How attention is computed. Both give the same numbers.
    pub enum Attention {
        /// One pass over the keys with a running softmax; the matrix of scores is never held as a whole.
        Fused = "fused" | "sdpa" | "flash_attention_2";
        /// The textbook form, which holds all scores: for comparison.
        Eager = "eager";
    }
}

section! {
    /// The base model. Its weights are never changed.
    #[derive(derive_new::new)]
    pub struct ModelSection {
        /// A directory in Hugging Face's layout (`config.json`, `*.safetensors`, `tokenizer.json`), or a hub id
        /// `org/name`. A path is taken relative to the current directory; what exists on disk is never looked up
        /// on the hub.
        source: String = required(String::new()) => text();
        /// Branch, tag or commit on the hub. Pinned to the commit in the `config.yaml` of a run; a local directory
        /// has no revision.
        revision: String = value("main".to_owned()) => text();
        /// How the frozen weights are stored in memory; `auto` keeps the format of the files, or f32 on a device that does
        /// not have both bf16 and f16. A format that the device lacks is an error.
        dtype: Dtype = value(Dtype::Auto) => choice();
        /// Format of activations; `auto` is `bf16` on a GPU that has it, else `f32`. Adapters, optimizer state and loss are
        /// f32 whatever it is. A format that the device lacks is an error.
        compute_dtype: Dtype = value(Dtype::Auto) => choice();
        /// How attention is computed. `sdpa` and `flash_attention_2`, the names used by transformers, mean `fused`.
        attention: Attention = value(Attention::Fused) => choice();
    }
}
