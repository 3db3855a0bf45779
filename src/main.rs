//! The `emberlora` command.
#[global_allocator]
static ALLOCATOR: emberlora::kernels::Allocator = emberlora::kernels::Allocator;

fn main() -> std::process::ExitCode {
    emberlora::cli::main()
}
