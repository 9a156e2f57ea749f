//! The real programs that tests run beside Baletheus; `scripts/tools` gets them and looks in the same places.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Prometheus server and the promtool that belongs to it.
pub struct Tool {
    pub binary: PathBuf,
    pub promtool: PathBuf,
}

pub fn prometheus(major: u8) -> Tool {
    let found = find(&format!("prometheus{major}"), &["prometheus"], |binary| {
        binary.with_file_name("promtool").is_file() && version(binary).starts_with(&format!("{major}."))
    });
    Tool { promtool: found.with_file_name("promtool"), binary: found }
}

pub fn node_exporter() -> PathBuf {
    find("node_exporter", &["node_exporter", "prometheus-node-exporter"], |_| true)
}

fn find(tool: &str, names: &[&str], fits: impl Fn(&Path) -> bool) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(tool);
    let path = env::var_os("PATH").unwrap_or_default();
    [own]
        .into_iter()
        .chain(env::split_paths(&path))
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .find(|file| file.is_file() && fits(file))
        .unwrap_or_else(|| panic!("{tool} is neither in target/tools nor on the PATH: run `scripts/test tools`"))
}

/// Such as `2.42.0+ds`.
fn version(binary: &Path) -> String {
    let output = Command::new(binary).arg("--version").output();
    let output = output.unwrap_or_else(|error| panic!("{} --version: {error}", binary.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    version.unwrap_or_default().to_owned()
}
