//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    baletheus::cli::main(std::env::args_os())
}
