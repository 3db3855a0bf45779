//! From rows of text to packed batches of tokens. No tensors.
//!
//! * [`conversation`]: a row before and after tokenisation
//! * [`tokenizer`]: text to tokens and back, as the model's own files say
//! * [`template`]: chat templates, and which bytes of the rendered text are trained
//! * [`mask`]: from trained bytes to trained tokens
//! * [`Dataset::load`]: files of rows, told apart by their content and their first row, to documents and a report
//! * [`Dataset::batches`]: documents to the packed or padded batches of an epoch, in an order of its own
//! * [`Batch`]: rows as forests, in which documents share the tokens that they begin with
//! * [`inspect()`]: single rows as the model will see them

mod batch;
pub mod conversation;
mod dataset;
mod encode;
mod epoch;
mod error;
mod inspect;
pub mod mask;
mod options;
mod order;
mod packing;
mod progress;
mod report;
mod row;
mod segments;
mod source;
pub mod template;
pub mod tokenizer;

pub use batch::{Batch, Target};
pub use conversation::{Conversation, Document, Message, MessageError, RowRef};
pub use dataset::Dataset;
pub use encode::{DropReason, Outcome};
pub use epoch::{Batches, Layout};
pub use error::{DataError, Keys, RowError};
pub use inspect::{InspectRows, InspectedRow, inspect};
pub use options::{DataOptions, PrefixSharing, Source};
pub use packing::best_fit_decreasing;
pub use progress::{NoProgress, Progress};
pub use report::{Counts, DataReport, EpochTokens, FileReport, Padding};
pub use row::{Format, FormatChoice};
pub use segments::Segment;
pub use source::Compression;
pub use template::{ChatTemplate, RenderOptions, Rendered, TemplateError};
pub use tokenizer::{Encoding, Tokenizer, TokenizerError};
