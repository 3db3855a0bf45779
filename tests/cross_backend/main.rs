//! One body, run on every backend that was compiled in: every operation and its gradient, training with and without
//! gradient checkpointing, generation, and adapters that change places.
//!
//! A backend that was compiled in has to be there: without a GPU, the one for wgpu is Mesa's software Vulkan, and where
//! that is missing these tests fail.

mod backends;
mod generation;
mod operations;
#[path = "../parity/mod.rs"]
mod parity;
mod training;

/// Runs each function once per backend, as a test of its own.
macro_rules! on_each_backend {
    ($($path:ident::$test:ident),* $(,)?) => {
        on_each_backend!(@backend "flex" flex, $($path::$test),*);
        on_each_backend!(@backend "ndarray" ndarray, $($path::$test),*);
        on_each_backend!(@backend "wgpu" wgpu, $($path::$test),*);
        on_each_backend!(@backend "cuda" cuda, $($path::$test),*);
    };
    (@backend $feature:literal $backend:ident, $($path:ident::$test:ident),*) => {
        #[cfg(feature = $feature)]
        mod $backend {
            $(
                #[test]
                fn $test() {
                    crate::$path::$test(&crate::backends::Tested::$backend());
                }
            )*
        }
    };
}

on_each_backend! {
    operations::operations_and_their_gradients_are_those_of_pytorch,
    training::ten_lora_steps_follow_peft,
    training::ten_qlora_steps_follow_peft_and_bitsandbytes,
    generation::greedy_tokens_are_those_of_transformers,
    generation::an_adapter_means_the_same_everywhere,
}
