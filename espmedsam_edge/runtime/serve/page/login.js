// Sends the token in a form's body, never in an address, and opens the page once the cookie is there.

const form = document.getElementById("login");
const problem = document.getElementById("problem");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  try {
    const answer = await fetch("login", { method: "POST", body: new URLSearchParams(new FormData(form)) });
    if (answer.ok) {
      location.replace("./");
      return;
    }
    const { error, hint } = await answer.json();
    problem.textContent = `${error} ${hint}`;
  } catch {
    problem.textContent = "The server does not answer. Is it running?";
  }
  form.elements.token.select();
});
