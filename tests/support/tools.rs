//! The real programs that tests run beside Baletheus; `scripts/lib/tools` gets them and looks in the same places.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Prometheus server and the promtool that belongs to it.
pub struct Tool {
    pub binary: PathBuf,
    pub promtool: PathBuf,
}

pub fn prometheus(major: u8) -> Tool {
    find_prometheus(major).unwrap_or_else(|| missing(&format!("prometheus{major}")))
}

pub fn find_prometheus(major: u8) -> Option<Tool> {
    let binary = find(&format!("prometheus{major}"), &["prometheus"], |binary| {
        binary.with_file_name("promtool").is_file() && version(binary).starts_with(&format!("{major}."))
    })?;
    Some(Tool { promtool: binary.with_file_name("promtool"), binary })
}

pub fn node_exporter() -> PathBuf {
    let names = ["node_exporter", "prometheus-node-exporter"];
    find(names[0], &names, |_| true).unwrap_or_else(|| missing(names[0]))
}

/// Alertmanager; its amtool is beside it.
pub fn alertmanager() -> PathBuf {
    let beside = |binary: &Path| binary.with_file_name("amtool").is_file();
    find("alertmanager", &["alertmanager", "prometheus-alertmanager"], beside)
        .unwrap_or_else(|| missing("alertmanager"))
}

/// Docker Compose, version 2.
pub fn docker_compose() -> PathBuf {
    let stack = "docker_compose is neither in target/tools nor on the PATH: run `scripts/lib/tools stack`";
    find("docker_compose", &["docker-compose"], |binary| version(binary).starts_with("2.")).expect(stack)
}

/// A backend for remote write.
pub fn victoria_metrics() -> PathBuf {
    let stack = "victoria-metrics is neither in target/tools nor on the PATH: run `scripts/lib/tools stack`";
    find("victoria_metrics", &["victoria-metrics"], |_| true).expect(stack)
}

/// The library that a program's wall clock is faked with.
pub fn faketime() -> PathBuf {
    let name = "faketime/libfaketimeMT.so.1";
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(name);
    let multiarch = Path::new("/usr/lib").read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = ["/usr/local/lib", "/usr/lib", "/usr/lib64"].map(PathBuf::from).into_iter().chain(multiarch);
    let mut all = [own].into_iter().chain(folders.map(|folder| folder.join(name)));
    all.find(|file| file.is_file()).unwrap_or_else(|| missing("faketime"))
}

/// valgrind, and the folder of its tools where it is not where it was built for.
pub fn valgrind() -> (PathBuf, Option<PathBuf>) {
    let program = find("valgrind", &["valgrind"], |_| true).unwrap_or_else(|| missing("valgrind"));
    let library = program.with_file_name("lib");
    (program, Some(library).filter(|library| library.join("default.supp").is_file()))
}

/// Fails unless this program of a Debian package is installed.
pub fn installed(program: &str, package: &str) {
    let found = Command::new(program).arg("-V").output();
    assert!(found.is_ok_and(|output| output.status.success()), "no `{program}`: install the package {package}");
}

/// The folder of what Cargo built with this profile, where the program that runs is a test or an example.
pub fn built() -> PathBuf {
    let program = env::current_exe().expect("the path of this program");
    program.ancestors().nth(2).expect("…/debug/deps/ or …/debug/examples/").to_owned()
}

/// Cargo as from a shell, with the profile and the target folder of the program that runs.
pub fn cargo(command: &str) -> Command {
    let (built, mut cargo) = (built(), Command::new(env!("CARGO")));
    // What Cargo tells the programs that it runs would have build scripts run again.
    for (name, _) in env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|of| name.to_string_lossy().starts_with(of))
        {
            cargo.env_remove(name);
        }
    }
    let profile = match built.file_name().and_then(|name| name.to_str()).expect("the name of a profile") {
        "debug" => "dev",
        name => name,
    };
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([command, "--profile", profile, "--target-dir"]);
    cargo.arg(built.parent().expect("the target folder"));
    cargo
}

fn find(tool: &str, names: &[&str], fits: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(tool);
    let path = env::var_os("PATH").unwrap_or_default();
    [own]
        .into_iter()
        .chain(env::split_paths(&path))
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .find(|file| file.is_file() && fits(file))
}

fn missing(tool: &str) -> ! {
    panic!("{tool} is neither in target/tools nor on the PATH: run `scripts/test tools`")
}

/// Such as `2.42.0+ds`; nothing if it does not run.
fn version(binary: &Path) -> String {
    let output = Command::new(binary).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let version = text.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    version.unwrap_or_default().to_owned()
}
