use super::*;

fn wish(command: &[&str]) -> Wish {
    Wish {
        command: command.iter().map(|w| (*w).to_owned()).collect(),
        environment: environment(),
        directory: "/".to_owned(),
        user: None,
    }
}

#[test]
fn programs_are_looked_up_like_a_shell_does() {
    let all = |program, path| candidates(program, path).collect::<Vec<_>>();
    assert_eq!(all("sh", "/usr/bin/:/bin:"), ["/usr/bin/sh", "/bin/sh", "./sh"]);
    assert_eq!(all("./sh", "/bin"), ["./sh"]);
    assert_eq!(all("/bin/sh", "/usr/bin"), ["/bin/sh"]);
}

#[test]
fn impossible_wishes_are_refused() {
    assert!(matches!(wish(&[]).strings(), Err(Unable::Empty)));
    assert!(matches!(wish(&[""]).strings(), Err(Unable::Empty)));
    assert!(matches!(wish(&["a\0b"]).strings(), Err(Unable::Zero(_))));
    let long = "x".repeat(COMMAND_BYTES_MAX);
    assert!(matches!(wish(&["echo", &long]).strings(), Err(Unable::TooLong)));
    let mut named = wish(&["true"]);
    named.environment.insert("A=B".to_owned(), String::new());
    assert!(matches!(named.strings(), Err(Unable::Name(_))));
}
