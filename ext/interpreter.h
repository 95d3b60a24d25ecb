/* The main interpreter alone: the stores of a process, its locks and its forks are known in one place.

   The code that Cython makes lets in whichever interpreter comes first, and refuses the others.  It asks for the
   interpreter's number before it makes anything, and -1 ends the import: so the question is answered here. */
#ifndef LOGKV_INTERPRETER_H
#define LOGKV_INTERPRETER_H

#include <Python.h>

static int64_t main_interpreter(PyInterpreterState *interpreter) {
    if (interpreter == PyInterpreterState_Main()) return 0;
    PyErr_SetString(PyExc_ImportError, "LogKV is for the main interpreter: no subinterpreter can import it");
    return -1;
}
#define PyInterpreterState_GetID(interpreter) main_interpreter(interpreter)

#endif
