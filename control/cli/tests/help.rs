//! The words of the command line: help texts and errors that need no cluster.

#[test]
fn words() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}
